"""What all plots of figures share: paper, colours, axes. Drawn with Matplotlib, imported when something is drawn."""

import io

from ddt_jax.io import atomic

CURVE = "#2563a8"
COLOURS = (CURVE, "#d9822b", "#4c9a6a", "#a3498b", "#7a6a53", "#c0392b", "#4aa3b8", "#6b7280")
PALE = "#c3d4e8"
FAINT = "#5a606b"


def new(width, height):
    """A figure of so many inches."""
    # Not pyplot: it keeps figures and a backend in global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axis, title):
    axis.set_title(title, fontsize=10, loc="left", color="#262a30")
    axis.grid(color="#e6e8ec", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#b8bdc6")
    axis.tick_params(which="both", labelsize=8, color="#b8bdc6", labelcolor=FAINT)


def save(figure, path):
    """Writes a PNG, whole or not at all. Returns the path."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return atomic.write_bytes(path, buffer.getvalue())


def legend(figure, columns=4):
    """Below the plot, where it hides no curve."""
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, labelcolor=FAINT, ncols=columns)
