"""The tokenizer of DDT-LLaMA (CVPR 2025, arXiv 2504.14666) at 256 px as far as it is known: 480 tokens of 65,536 codes,
x0-prediction, one token per timestep, ImageNet. Hardware: a pod. It has never been trained to its end here.

Its code and weights are not public. Known from the authors' page: 480 tokens and timesteps; tokens 1..t are seen at
timestep t, all at pure noise, so that token 1 is fine detail and token 480 the coarsest; a language model reads them in
this order, fine to coarse (`model.schedule.direction="selftok"` keeps them so; Selftok's own models read backwards).
Known from reviews: the codebook, 16 dimensions, cosine similarity and moving averages; an encoder of width 256 with
learned queries in a stream of its own; an MMDiT decoder; the loss |d(t e + (1 - t) x0, t, V) - x0|^2 + commitment; dead
codes move to encoder outputs of the step; 21.7 dB on ImageNet's validation set.

Not known, and chosen here:
- depth of the encoder, its image stream, places of the tokens, sizes of the decoder: those of the successor Selftok,
  whose networks are public and fit the same description.
- the latents: those of SD3's autoencoder, as in Selftok.
- times: continuous, where the paper has 480 levels; between two of them the decoder sees the tokens of the noisier one.
- decoding: Euler with 48 steps, every tenth timestep, on the straight path that the loss names (the paper: 480 steps).
- weight of the commitment, decay of the averages, rate, betas: Selftok's. Its diversity loss came later and is off.
- which codes are dead: below 3 % of an even share; moved ones start with the even share (`settings.Quantizer`).
- when codes are taken from the data: once features differ between images, which at the start of such an encoder they
  do not.
- batch 384 and 100,000 steps: Selftok's batch, and what names of old checkpoints tell (60,000 to 110,000).
"""

from ddt_jax import config, settings


def get_config():
    c = config.defaults()
    c.name = "ddt_llama_256"
    c.data.source = "parquet:${DDT_JAX_DATA}/imagenet/train-*.parquet"
    c.data.eval_source = "parquet:${DDT_JAX_DATA}/imagenet/val-*.parquet"
    c.data.image_size = 256
    c.data.threads = 16
    c.model = config.defaults(settings.SelftokTokenizer)
    c.model.num_tokens = 480
    c.model.encoder.width, c.model.encoder.heads = 256, 4
    c.model.schedule = config.defaults(settings.Schedule, kind="timesteps", direction="selftok")
    c.model.flow.prediction = "x0"
    c.model.flow.solver_steps = 48
    c.model.quantizer.codebook_size = 65536
    c.model.quantizer.diversity = 0.0
    c.model.quantizer.revive_below = 0.03
    c.model.quantizer.revive_from = c.model.quantizer.revive_count = "uniform"
    c.model.dtype = "bfloat16"
    c.model.codec.dtype = "bfloat16"
    c.optimizer.name = "adamw"
    c.optimizer.lr = 5e-5
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 1000
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0
    c.train.steps = 100_000
    c.train.batch_size = 384
    c.train.ema = 0.9999
    c.train.log_every = 100
    c.train.checkpoint_every = 1000
    c.evaluate.images = 50_000
    return c
