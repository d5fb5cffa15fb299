"""The multimodal transformer: its backbone, how an image enters a sequence, what it reads, how it draws tokens."""

from dataclasses import dataclass, field
from typing import Literal

from ddt_jax.settings.codecs import IdentityCodec, VAECodec
from ddt_jax.settings.diffusion import DDPM, RectifiedFlow


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those trained on."""

    kind: Literal["none", "linear", "llama3"] = "none"
    factor: float = 8.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_context: int = 8192  # llama3


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank updates of linear maps (arXiv 2106.09685)."""

    rank: int = 0  # 0 = none
    alpha: float = 16.0  # the update is scaled by alpha / rank
    targets: tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...] = ("query", "value")
    dropout: float = 0.0  # of what updates read
    whole: tuple[Literal["embed", "head", "norms"], ...] = ()  # what else is trained, itself and not by an update


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """The decoder-only backbone of LLaMA-3 (arXiv 2407.21783) and what other recipes add to it."""

    vocab_size: int = 1024  # text, special tokens and image codes together
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0  # 0 = width / heads
    mlp_width: int = 384
    norm_epsilon: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tied_head: bool = False  # the head is the table of embeddings
    qk_norm: bool = False  # RMS norm of each head's queries and keys (Chameleon)
    attention_soft_cap: float = 0.0  # 0 = none
    logit_soft_cap: float = 0.0
    z_loss: float = 0.0  # weight of the squared log-sum of the logits (Chameleon: 1e-5)
    dropout: float = 0.0  # of what attention and MLP add to the residual stream
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "attention", "dots_attention"] = "none"  # what backwards computes again
    attention: Literal["auto", "dense", "chunked", "splash"] = "auto"
    loss_chunk: int = 0  # rows whose logits exist at once, on each device; 0 = at least 256, more of a small vocabulary
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRA = field(default_factory=LoRA)


@dataclass(frozen=True, kw_only=True)
class CodeImages:
    """Images as codes of a tokenizer, predicted like text. What is 0 or "" here is what the codes of the run say."""

    kind: Literal["codes"] = "codes"
    num_tokens: int = 0  # codes of an image
    codebook_size: int = 0
    tokenizer: str = ""  # fingerprint of the tokenizer that made the codes
    order: str = ""  # in which codes stand in a sequence
    code_vectors: bool = False  # embedding and head also see the tokenizer's vectors (multimodal/code_embedding.py)
    code_places: bool = False  # embeddings also say which code of its image each is
    code_width: int = 0  # of those vectors


@dataclass(frozen=True, kw_only=True)
class LinearCoder:
    """Patches to rows of the transformer and back by one linear map each; a vector for the noise level is added."""

    kind: Literal["linear"] = "linear"
    places: bool = False  # a learned vector of its place is added to each row: a small model finds "top left" sooner


@dataclass(frozen=True, kw_only=True)
class UNetCoder:
    """Patches to rows and back by the two halves of a U-Net. Defaults: Transfusion's 0.27 billion parameters."""

    kind: Literal["unet"] = "unet"
    width: int = 1248  # channels where there is one position for each row; half as many at twice the resolution, ...
    blocks: int = 2  # residual blocks of each resolution on the way down; one more on the way up
    remat: bool = False  # compute a residual block again for its gradient rather than keep what it computed


@dataclass(frozen=True, kw_only=True)
class DiffusionImages:
    """Images as latents, denoised by the transformer: all of an image in place (Transfusion, arXiv 2408.11039), or
    block by block beside the clean ones before it (ACDiT, arXiv 2412.07720).
    """

    kind: Literal["diffusion"] = "diffusion"
    patch_size: int = 2  # latents of a row of the transformer: so many squared
    block_size: int = 0  # rows of a block, a square of them; blocks follow each other as in ACDiT. 0 = all at once
    coder: LinearCoder | UNetCoder = field(default_factory=LinearCoder)
    weight: float = 5.0  # of the diffusion loss beside that of the next token
    noise_limit: float = 0.5  # highest noise level of images that stand before what describes them; 1 = none (§4.3.4)
    attention: Literal["bidirectional", "causal"] = "bidirectional"  # inside an image; causal: Transfusion's ablation
    # Where a network predicts the noise, nothing but `clip` holds the first steps from pure noise.
    diffusion: DDPM | RectifiedFlow = field(default_factory=lambda: DDPM(clip=5.0))
    codec: IdentityCodec | VAECodec = field(default_factory=IdentityCodec)


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """A decoder-only transformer over sequences of text and images."""

    kind: Literal["multimodal"] = "multimodal"
    transformer: Transformer = field(default_factory=lambda: Transformer(vocab_size=0))  # 0 = what text and codes need
    image: CodeImages | DiffusionImages = field(default_factory=CodeImages)
    # What is given (captions that are drawn, images that are described, turns of a user) sees all of itself, not only
    # what stands before; the loss counts answers only.
    whole_prompts: bool = False


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Shares of what a record becomes (docs/sequences.md); any scale."""

    text_to_image: float = 0.0
    image_to_text: float = 0.0
    text_only: float = 0.0
    image_only: float = 0.0  # also what guidance takes for a caption that was dropped
    own: float = 0.0  # the document that a record brings: questions, editing, conversations, texts with images


@dataclass(frozen=True, kw_only=True)
class CodesFolder:
    """A folder that `ddt-jax tokenize` has written, as one part of a mixture."""

    kind: Literal["codes"] = "codes"
    folder: str = ""
    weight: float = 1.0  # share of rows, any scale
    formats: Formats = field(default_factory=lambda: Formats(text_to_image=0.45, image_to_text=0.45, image_only=0.1))


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A source of images with captions (data/base.py), as one part of a mixture where images are not codes."""

    kind: Literal["pictures"] = "pictures"
    source: str = "scenes:train"
    records: int = 0  # only so many, from the first; 0 = all
    weight: float = 1.0  # share of rows, any scale
    formats: Formats = field(  # the caption first in four of five, as in Transfusion
        default_factory=lambda: Formats(text_to_image=0.7, image_to_text=0.2, image_only=0.1)
    )


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts without images, as one part of a mixture, whatever images are in the others."""

    kind: Literal["texts"] = "texts"
    source: str = ""  # parquet:GLOB, or parquet:GLOB?caption=COLUMN
    records: int = 0  # only so many, from the first; 0 = all
    split: bool = False  # a text that is longer than a row goes on in further rows, whatever sequences.truncate says
    weight: float = 1.0  # share of rows, any scale


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What a multimodal transformer reads: a mixture of sources, packed into rows of one length."""

    text: str = ""  # sentencepiece model or tokenizer.json; "" = one is made of what sources say, and kept with the run
    text_vocab_size: int = 512  # of one that is made, at most
    vocab_multiple: int = 1  # spare ids make the vocabulary a multiple of this
    context: int = 256  # positions of a row
    images: int = 0  # images a row can hold; 0 = as many as fit
    targets: int = 0  # positions of a row that the loss looks at; 0 = no limit of their own
    truncate: bool = False  # cut texts that are longer than a row, rather than refuse them
    answers_only: bool = False  # a caption that is drawn, an image that is described are no targets
    sources: tuple[CodesFolder | Pictures | Texts, ...] = ()
    eval_sources: tuple[CodesFolder | Pictures | Texts, ...] = ()  # held-out ones, of the same tokenizers
    tokenizer: str = ""  # workdir of the image tokenizer, which draws what is generated

    @property
    def latents(self) -> tuple[Pictures, ...]:
        """Those of `sources` that hold kept latents in place of images."""
        return tuple(p for p in self.sources if p.kind == "pictures" and p.source.startswith("latents:"))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. The filters apply in this order, each to what the one before has left.

    Of images that are denoised, `guidance` alone counts, with what is predicted of noise in place of logits.
    """

    tokens: int = 256  # new ones, at most; 0 = what an image needs
    guidance: float = 1.0  # g: logits u + g (c - u) of an unconditional and a conditional prompt; 1 = none
    temperature: float = 1.0  # 0 = always the likeliest
    top_k: int = 0  # only the k likeliest; 0 = all
    top_p: float = 1.0  # only the likeliest that together reach this probability
    min_p: float = 0.0  # only what has this share of the likeliest one's probability
