"""Draws an `Explanation`: the paper's figures 2 to 5 and 7 for one picture, the plain tower above the refocused one."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from PIL import Image

from rfclip.explanation.explanation import SEGMENTED_BY, Explanation, busiest
from rfclip.explanation.registers import Comparison
from rfclip.methods import RF_CLIP
from rfclip.segment.drawing import Colour, as_seen, marked, soft_gray
from rfclip.segment.result import Segmentation

POINTS: tuple[Colour, ...] = ((0, 160, 255), (255, 159, 0), (0, 208, 96), (208, 96, 255))  # of the points, in turn
RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.35, 0.95)  # tokens that distract, and those that receive
OPACITY = 0.65  # of maps over the picture
ROWS = ("before", "after")
CAPTIONS = {
    "overview": "The block where refocusing moves the most attention. Before: tokens over the threshold in red. After: "
    "their embeddings are repaired, and a share beta of the attention they drew goes to the blue tokens.",
    "attention": "What each point attends to, by block; both rows of a point share the scale of the plain tower.",
    "matrices": "Attention averaged over heads: rows are queries, columns keys, CLS first. Triangles mark distraction "
    "tokens.",
    "profile": "The mean weight of each dimension over patches and blocks; after: once embeddings are repaired.",
    "tokens": "Each patch: the attention it receives against its largest weight. Dashed: the thresholds. Red: over the "
    "threshold, or over it before the repair.",
    "maps": "Tokens that give attention (red) and receive it (blue), the second eigenvector of the graph cut, and how "
    "much attention was moved away from a token (red) or to it (blue).",
    "segmentation": "The picture segmented in windows, as by `rfclip segment`.",
    "registers": "What RF-CLIP takes for distraction tokens, in any block, beside what test-time registers take for "
    "outliers, the tokens of a large norm at the output of the last block; and what CLS attends to there.",
}


def draw(found: Explanation) -> dict[str, Figure]:
    """Every figure, by name: overview, attention, matrices, profile, tokens, maps and, with classes, segmentation."""
    figures = {
        "overview": draw_overview(found),
        "attention": draw_attention(found),
        "matrices": draw_matrices(found),
        "profile": draw_profile(found.before.profile, found.config.distraction_dims, found.after.profile),
        "tokens": draw_tokens(found),
        "maps": draw_maps(found),
    }
    if found.segmentations:
        figures["segmentation"] = draw_segmentations(found)
    return figures


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def report(found: Explanation, pictures: Mapping[str, bytes], title: str, facts: Mapping[str, object]) -> str:
    """A self-contained HTML page with an explanation's figures as PNG, and everything known about it."""
    facts = {
        **facts,
        "patches": f"{found.grid[0]} x {found.grid[1]}",
        "distraction tokens by block": ", ".join(str(mask.sum()) for mask in found.distraction),
        "config": found.config.to_json(),
    }
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td><pre>{html.escape(str(v))}</pre></td></tr>" for k, v in facts.items()
    )
    shown = "".join(
        f'<h2>{name}</h2><p>{html.escape(CAPTIONS[name])}</p><img alt="{name}" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        for name, picture in pictures.items()
    )
    style = "body{font-family:sans-serif;max-width:1250px;margin:2em auto}img{max-width:100%}th{text-align:left}"
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><p>{html.escape(describe(found))}</p>{shown}<h2>facts</h2><table>{rows}</table></html>\n"
    )


def describe(found: Explanation) -> str:
    """What RF-CLIP did to the picture seen whole, in sentences with figures."""
    number = busiest(found.moved, found.distraction)
    if number is None or not found.distraction.any():
        return "RF-CLIP finds no distraction token here: it amounts to the layer-averaged key-key attention."
    blocks, block = np.count_nonzero(found.distraction.any(axis=1)), number - 1
    said = f"RF-CLIP finds {found.distraction.sum()} distraction tokens in {blocks} of {len(found.distraction)} blocks."
    if found.moved.any():
        distraction, defocused = found.distraction[block], found.defocused[block]
        (gave, gives), (got, gets) = (
            [f"{100 * view.received[block][tokens].sum():.1f} %" for view in found.views]
            for tokens in (distraction, defocused)
        )
        said += (
            f" In block {number}, where most is moved, {distraction.sum()} of {distraction.size} patches distract: "
            f"they receive {gives} of the attention instead of {gave}, and {defocused.sum()} defocused ones {gets} "
            f"instead of {got}."
        )
    if found.segmentations:
        _, without, refocused = (each.labels for each in found.segmentations.values())
        changed = f"{100 * (without != refocused).mean():.1f} % of the pixels"
        if RF_CLIP in found.segmentations:
            said += f" Refocusing changes the class of {changed}."
        else:
            said += f" The released code gives another class than kk-mean to {changed}."
    return said


@dataclass(frozen=True)
class Scale:
    """The colours of a map over the gray picture.

    Attributes:
        colours: Matplotlib's name of them.
        low, high: the values that the first and the last stand for.
    """

    colours: str
    low: float
    high: float

    @classmethod
    def attention(cls, values: np.ndarray) -> Scale:
        """From 0 to nearly the highest of these values."""
        return cls("magma", 0, max(float(np.quantile(values, 0.99)), 1e-12))

    @classmethod
    def around_zero(cls, colours: str, values: np.ndarray) -> Scale | None:
        """For values of either sign; None if they are missing, or all zero."""
        top = float(np.abs(values).max())
        return cls(colours, -top, top) if top > 0 else None  # not so if NaN

    def mappable(self, opacity: float = OPACITY) -> ScalarMappable:
        """For a colour bar: colours as they are seen over the picture, whose mean is a middle gray."""
        pure = matplotlib.colormaps[self.colours](np.linspace(0, 1, 256))[:, :3]
        seen = ListedColormap(opacity * pure + (1 - opacity) * 0.5)
        return ScalarMappable(Normalize(self.low, self.high), seen)

    def over(self, found: Explanation | Comparison, values: np.ndarray) -> Image.Image:
        """Values [N] as a translucent map over the gray picture, RGB."""
        cells = matplotlib.colormaps[self.colours](Normalize(self.low, self.high)(values), bytes=True)[:, :3]
        shown = Image.fromarray(cells.reshape(*found.grid, 3)).resize(found.image.size, Image.Resampling.NEAREST)
        return Image.blend(soft_gray(found.image), shown, OPACITY)


def token_map(found: Explanation | Comparison, red: np.ndarray, blue: np.ndarray) -> Image.Image:
    """The picture in gray, with sets of tokens, bool [N], in colour."""
    cells = np.zeros((*found.grid, 4), np.float32)
    for colour, chosen in ((RED, red), (BLUE, blue)):
        cells[chosen.reshape(found.grid)] = (*colour, 0.6)
    tint = Image.fromarray((255 * cells).astype(np.uint8)).resize(found.image.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(found.image.convert("L").convert("RGBA"), tint).convert("RGB")


def at_point(found: Explanation, picture: Image.Image, place: int) -> Image.Image:
    """A map with a point's patch marked by a dot in the point's colour."""
    (row, column), (rows, columns) = found.points[place], found.grid
    return marked(picture, (column + 0.5) / columns, (row + 0.5) / rows, POINTS[place % len(POINTS)])


def draw_overview(found: Explanation) -> Figure:
    """At a glance, in the block that moves most: tokens, attention received, a point's attention, segmentation."""
    block = (busiest(found.moved, found.distraction) or found.layers[-1]) - 1
    columns = 4 if found.segmentations else 3
    figure, axes = _axes(2, columns, found, bars=1)
    tau, distraction = found.thresholds[0], found.distraction[block]
    received, pointed = (
        Scale.attention(values) for values in (found.before.received[block], found.before.pointed[block, 0])
    )
    for row, view in zip(axes, found.views, strict=True):
        over = view.weights[block] > tau if found.config.distraction_dims else np.zeros(len(view.weights[block]), bool)
        row[0].imshow(token_map(found, over, found.defocused[block] & ~over))
        row[1].imshow(received.over(found, view.received[block]))
        row[2].imshow(at_point(found, pointed.over(found, view.pointed[block, 0]), 0))
        if distraction.any():
            share, patches = view.received[block][distraction].sum(), distraction.mean()
            row[1].set_xlabel(
                f"{100 * share:.1f} % goes to distraction tokens,\n{100 * patches:.1f} % of the patches", fontsize=8
            )
    _bar(figure, axes[:, 1], received)
    _bar(figure, axes[:, 2], pointed)
    titles = [f"block {block + 1}: tokens over the threshold\n(red) and defocused (blue)", "attention received"]
    titles.append("attention of the point")
    if found.segmentations:
        last = list(found.segmentations.values())[1:]
        for row, segmented in zip(axes, last, strict=True):
            _segmentation(row[3], found, segmented)
        _legend(figure, last, " \N{RIGHTWARDS ARROW} ")
        titles.append("segmentation")
    return _titled(figure, axes, titles)


def draw_attention(found: Explanation) -> Figure:
    """What each point attends to in each layer requested (figure 2)."""
    figure, axes = _axes(2 * len(found.points), len(found.layers), found, bars=len(found.points))
    for place in range(len(found.points)):
        rows = axes[2 * place : 2 * place + 2]
        for column, layer in zip(rows.T, found.layers, strict=True):
            scale = Scale.attention(found.before.pointed[layer - 1, place])
            for ax, view in zip(column, found.views, strict=True):
                ax.imshow(at_point(found, scale.over(found, view.pointed[layer - 1, place]), place))
            _bar(figure, column, scale)
    return _titled(figure, axes, [f"block {layer}" for layer in found.layers])


def draw_matrices(found: Explanation) -> Figure:
    """The attention matrices, averaged over heads; triangles mark the distraction tokens' columns (figure 2)."""
    figure, axes = _axes(2, len(found.layers), found, square=True, bars=1)
    for column, layer in zip(axes.T, found.layers, strict=True):
        scale = Scale("magma", 0, float(np.quantile(found.before.attention[layer], 0.995)))
        for ax, view in zip(column, found.views, strict=True):
            shown = scale.mappable(opacity=1)
            ax.imshow(view.attention[layer], cmap=shown.cmap, norm=shown.norm, interpolation="nearest")
            prefix = len(view.attention[layer]) - found.distraction.shape[1]
            columns = prefix + np.flatnonzero(found.distraction[layer - 1])
            limits = ax.get_xlim(), ax.get_ylim()
            (marks,) = ax.plot(columns, np.full(len(columns), -3.0), "v", color=RED, markersize=3, clip_on=False)
            marks.set_in_layout(False)
            ax.set(xlim=limits[0], ylim=limits[1])
        _bar(figure, column, scale, opacity=1)
    return _titled(figure, axes, [f"block {layer}" for layer in found.layers])


def draw_profile(profile: np.ndarray, dims: tuple[int, ...], refocused: np.ndarray | None = None) -> Figure:
    """Mean weights [d] over dimensions, D_dis marked, and the 5 / d that calibration requires (figures 3a and 7a)."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    ax, width = figure.subplots(), len(profile)
    ax.plot(profile * width, color="0.3", linewidth=0.8, label="before")
    if refocused is not None:
        ax.plot(refocused * width, color=BLUE, linewidth=0.8, label="after")
    ax.plot(list(dims), profile[list(dims)] * width, "o", color=RED, markersize=4, label="D_dis")
    ax.axhline(5, color="0.5", linestyle="--", linewidth=0.8, label="5 / d")
    ax.set(xlabel="dimension", ylabel="mean weight, in units of 1 / d", xlim=(-1, width))
    ax.legend(fontsize=8, loc="upper right")
    return figure


def draw_tokens(found: Explanation) -> Figure:
    """Attention received by each patch against its largest weight in D_dis, and the thresholds (3b, 4a and 7b)."""
    figure = Figure(figsize=(2.6 * len(found.layers) + 0.6, 5.2), layout="constrained")
    axes = figure.subplots(2, len(found.layers), squeeze=False, sharex="col", sharey="col")
    weight, attention = found.thresholds
    for row, view, name in zip(axes, found.views, ROWS, strict=True):
        for ax, layer in zip(row, found.layers, strict=True):
            over = found.distraction[layer - 1] | (view.weights[layer - 1] > weight)
            colours = np.where(over[:, None], RED, (0.4, 0.4, 0.4))
            ax.scatter(view.weights[layer - 1], view.received[layer - 1], s=8, c=colours)
            ax.axvline(weight, color="0.5", linestyle="--", linewidth=0.8)
            if attention is not None:
                ax.axhline(attention, color="0.5", linestyle="--", linewidth=0.8)
            ax.tick_params(labelsize=7)
        row[0].set_ylabel(f"{name}: attention received", fontsize=8)
    for ax, layer in zip(axes[0], found.layers, strict=True):
        ax.set_title(f"block {layer}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("largest weight", fontsize=8)
    return figure


def draw_maps(found: Explanation) -> Figure:
    """Distraction and defocused tokens, the Fiedler vector and the attention moved, in the layers requested (4b, 5)."""
    figure, axes = _axes(3, len(found.layers), found, bars=2)
    for column, layer in zip(axes.T, found.layers, strict=True):
        block = layer - 1
        column[0].imshow(token_map(found, found.distraction[block], found.defocused[block]))
        for ax, values, colours, percent in (
            (column[1], found.fiedler[block], "PiYG", False),
            (column[2], found.moved[block], "coolwarm_r", True),  # red gives, blue receives
        ):
            scale = Scale.around_zero(colours, values)
            if scale:
                ax.imshow(scale.over(found, values))
                _bar(figure, [ax], scale, percent)
            else:
                ax.imshow(found.image.convert("L"), cmap="gray", alpha=0.4)
                ax.text(0.5, 0.5, "none", transform=ax.transAxes, ha="center", va="center")
    names = ("distraction (red),\ndefocused (blue)", "Fiedler vector", "attention moved")
    return _titled(figure, axes, [f"block {layer}" for layer in found.layers], names)


def draw_segmentations(found: Explanation) -> Figure:
    """The picture segmented by plain CLIP, without refocusing, and by RF-CLIP or the released code."""
    figure, axes = _axes(1, len(found.segmentations), found)
    for ax, segmented in zip(axes[0], found.segmentations.values(), strict=True):
        _segmentation(ax, found, segmented)
    _legend(figure, found.segmentations.values(), " / ")
    return _titled(figure, axes, [SEGMENTED_BY[method] for method in found.segmentations], ("",))


def draw_registers(found: Comparison) -> Figure:
    """Distraction tokens beside outliers and the attention of CLS: plain, with registers, and refocused."""
    figure, axes = _axes(2, 4, found, bars=1)
    before, after = found.outliers
    nobody = np.zeros_like(before)
    distraction = f"RF-CLIP: {found.distraction.sum()} distraction tokens"
    distraction += "" if found.overlap is None else f"\noverlap with the outliers {100 * found.overlap:.0f} %"
    norms, paid = Scale("viridis", 0, float(found.norms[0].max())), Scale("magma", 0, float(found.attention[0].max()))
    plain, registers, refocused = (paid.over(found, each) for each in found.attention)
    shares = [f"{100 * each[before].sum():.1f} % to these patches" for each in found.attention]
    panels = (
        (token_map(found, found.distraction, nobody), distraction),
        (token_map(found, nobody, before), f"{before.sum()} outliers"),
        (norms.over(found, found.norms[0]), f"norms; an outlier's is over {found.threshold:.0f}"),
        (plain, f"attention of CLS:\n{shares[0]}"),
        (refocused, f"attention of CLS, refocused:\n{shares[2]}"),
        (token_map(found, nobody, after), f"{after.sum()} outliers with a register"),
        (norms.over(found, found.norms[1]), "norms with a register"),
        (registers, f"attention of CLS, with a register:\n{shares[1]}, {100 * found.register:.1f} % to it"),
    )
    for ax, (picture, title) in zip(axes.flat, panels, strict=True):
        ax.imshow(picture)
        ax.set_title(title, fontsize=8)
    _bar(figure, axes[:, 2], norms, percent=False)
    _bar(figure, axes[:, 3], paid)
    return figure


def _axes(
    rows: int, columns: int, found: Explanation | Comparison, square: bool = False, bars: int = 0
) -> tuple[Figure, np.ndarray]:
    """A figure for pictures in rows and columns, with room for rows of colour bars."""
    aspect = 1 if square else min(found.image.height / found.image.width, 2)  # a taller picture is drawn narrower
    size = (2.6 * columns + 0.4, (2.6 * aspect + 0.1) * rows + 0.3 * bars + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure, axes


def _titled(figure: Figure, axes: np.ndarray, columns: list[str], rows: tuple[str, ...] = ()) -> Figure:
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title, fontsize=9)
    for number, ax in enumerate(axes[:, 0]):
        ax.set_ylabel(rows[number] if rows else ROWS[number % 2], fontsize=9)
    return figure


def _bar(figure: Figure, axes: Iterable[Axes], scale: Scale, percent: bool = True, opacity: float = OPACITY) -> None:
    """A colour bar below the axes that share its scale, by default in percent of the attention."""
    bar = figure.colorbar(
        scale.mappable(opacity),
        ax=list(axes),
        location="bottom",
        aspect=25,
        shrink=0.9,
        pad=0.03,
        panchor=False,  # else these axes would move away from those without a bar
        ticks=[scale.low, 0, scale.high] if scale.low < 0 else [0, scale.high],
        format=PercentFormatter(1) if percent else "%.3g",
    )
    bar.ax.tick_params(labelsize=7)
    first, *_, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")  # else they would run into those of the next bar
    last.set_horizontalalignment("right")


def _segmentation(ax: Axes, found: Explanation, segmented: Segmentation) -> None:
    """As large as the maps beside it, whose sides are rounded to patches."""
    size = found.image.size
    ax.imshow(segmented.overlay(legend=False).resize(size, Image.Resampling.LANCZOS))


def _legend(figure: Figure, segmentations: Iterable[Segmentation], between: str) -> None:
    """Below the figure: the classes that cover half a percent or more, and how much of each segmentation."""
    segmentations = list(segmentations)
    shares = [segmented.shares for segmented in segmentations]
    patches = []
    for name, colour in zip(segmentations[0].classes, segmentations[0].palette, strict=True):
        if any(each[name] >= 0.005 for each in shares):
            percent = between.join(f"{100 * each[name]:.0f}" for each in shares)
            face = "#{:02x}{:02x}{:02x}".format(*as_seen(colour))
            patches.append(Patch(facecolor=face, edgecolor="black", linewidth=0.5, label=f"{name} {percent} %"))
    columns = max(1, round(figure.get_figwidth() / 1.9))
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
