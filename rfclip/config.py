"""RF-CLIP's settings in one frozen dataclass, and what a file of them says of where they are from.

Nothing heavy is imported here, so that the command line can check settings before it loads PyTorch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from rfclip.files import parse_json

TINY = "rfclip-tiny"  # the small CLIP bundled with the package
BackendName = Literal["auto", "eager", "reference", "triton"]
PrecisionName = Literal["fp32", "bf16", "fp16"]
PostName = Literal["none", "pamr", "pearl", "resclip"]
BACKENDS: tuple[str, ...] = get_args(BackendName)
POSTS: tuple[str, ...] = get_args(PostName)  # what may happen after a first pass, to logits or to attention

CHOICES = {
    "tokens": ("distraction", "random"),
    "embedding": ("redistribute", "mean", "median", "clamp", "none"),
    "target": ("defocused", "non-distraction", "cls", "rest"),
    "similarity": ("kk-mean", "kk", "qq", "vv"),
    "cut_threshold": ("mean", "otsu"),
    "proxy": ("kk-mean", "kk", "qq", "vv", "qk", "none"),
    "neighbourhood": (3, 5, 7),
}


@dataclass(frozen=True)
class RefocusConfig:
    """What RF-CLIP does to an image tower. The defaults are the paper's; equation and table numbers are the paper's.

    Attributes:
        distraction_dims: the over-active dimensions D_dis of the residual stream. If empty, nothing is refocused, and
            dense features come from the proxy attention alone.
        tau: a token is a distraction token if its score exceeds `tau / d`, d being the tower's width (equation 6).
        tau_attn: if given, the token must also receive more than `tau_attn / N` of the attention, N being the number
            of patches (appendix A, used for ViT-L/14). The preset's factor of 5 is this project's choice.
        shifted: shift each token to be non-negative before scoring it; False scores the raw, signed embedding.
        tokens: "random" replaces the distraction tokens by as many tokens drawn at random (table 4, II).
        embedding: what happens to the embedding of a distraction token: "redistribute" (equation 13), a "mean" or
            "median" filter over its neighbourhood, "clamp" to the threshold (table 1), or "none".
        neighbourhood: side of the square of neighbours: 3, 5 or 7 (table 5).
        beta: the share of their attention that distraction tokens lose (equation 9); 0 leaves attention alone.
        target: who receives it: "defocused" tokens, all "non-distraction" patches, "cls" (table 6), or the "rest":
            non-distraction patches and CLS, which with `beta=1` is attention masked to -inf (table 1).
        similarity: what the graph cut that finds defocused tokens runs on: softmax(k k^T) averaged over the layers so
            far ("kk-mean", equation 7), or "kk", "qq", "vv" of the current layer (table 5).
        cut_threshold: "mean" of the second eigenvector (equation 8) or "otsu" (table 5).
        proxy: the last block's attention: "kk-mean" over all layers (equation 14), or "kk", "qq", "vv" or "qk" of the
            last layer (table 7), all without residual and MLP; "none" runs the last block unchanged.
        layers: numbers, from 1, of the blocks whose input is refocused; None means all (table 7).

    On every backend, clamping and the mean and median filters run in the reference's PyTorch, and random tokens are
    drawn on the host; all other choices run on the Triton kernels if that is the backend.

    Raises:
        ValueError: for a value that is not listed above, or one that another choice makes irrelevant: a neighbourhood
            where no neighbour is read, a similarity or threshold where nothing is cut, or random tokens to clamp,
            since only tokens over the threshold can be clamped.
    """

    distraction_dims: tuple[int, ...]
    tau: float = 5.0
    tau_attn: float | None = None
    shifted: bool = True
    tokens: str = "distraction"
    embedding: str = "redistribute"
    neighbourhood: int = 3
    beta: float = 0.7
    target: str = "defocused"
    similarity: str = "kk-mean"
    cut_threshold: str = "mean"
    proxy: str = "kk-mean"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "distraction_dims", _whole_numbers("distraction_dims", self.distraction_dims, least=0))
        if self.layers is not None:
            object.__setattr__(self, "layers", _whole_numbers("layers", self.layers, least=1))
        for name, accepted in CHOICES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, type(accepted[0])) or value not in accepted:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, accepted))}")
        for name, least, most in (("tau", 0, None), ("tau_attn", 0, None), ("beta", 0, 1)):
            value = getattr(self, name)
            if value is None and name == "tau_attn":
                continue
            if (
                not isinstance(value, int | float)
                or not is_finite(value)
                or not value >= least
                or (most is not None and value > most)
            ):
                upper = "" if most is None else f" and at most {most}"
                raise ValueError(f"{name}={value!r}: expected a number of at least {least}{upper}")
        if not isinstance(self.shifted, bool):
            raise ValueError(f"shifted={self.shifted!r}: expected True or False")
        self._check_together()

    def _check_together(self) -> None:
        if self.embedding in ("clamp", "none"):
            self._refuse_unread("neighbourhood", "embedding", "'redistribute', 'mean' or 'median'")
        if self.target != "defocused":
            for name in ("similarity", "cut_threshold"):
                self._refuse_unread(name, "target", "'defocused'")
        if self.embedding == "clamp":
            self._refuse_unread("tokens", "embedding", "'redistribute', 'mean' or 'median'")

    def _refuse_unread(self, name: str, other: str, readers: str) -> None:
        """Refuse a non-default choice that only some values of another field read."""
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value != default:
            raise ValueError(
                f"{name}={value!r} has no effect with {other}={getattr(self, other)!r}: "
                f"take {other}={readers}, or {name}={default!r}"
            )

    def thresholds(self, width: int, patches: int) -> tuple[float, float | None]:
        """tau / d and tau_attn / N (None without tau_attn), for a tower of width d on N patches.

        The one place where thresholds change from multiples of the uniform share to shares.
        """
        return self.tau / width, None if self.tau_attn is None else self.tau_attn / patches

    def check_tower(self, width: int, layers: int) -> None:
        """Raise ValueError if a dimension or a block lies outside a tower of that width and number of blocks."""
        for name, values, most in (
            ("distraction_dims", self.distraction_dims, width - 1),
            ("layers", self.layers, layers),
        ):
            beyond = [value for value in values or () if value > most]
            if beyond:
                raise ValueError(f"{name} {beyond}: this tower (width {width}, {layers} blocks) accepts at most {most}")

    def to_json(self, origin: Origin | None = None) -> str:
        """All fields as a JSON object, after those of its origin that are known."""
        about = {} if origin is None else {k: v for k, v in asdict(origin).items() if v is not None}
        return json.dumps(about | asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RefocusConfig:
        """The config that `to_json` wrote; omitted fields take their defaults.

        Raises:
            ValueError: for text that is not a JSON object of the fields of this class and of `Origin`.
        """
        return read_settings(text)[0]

    @classmethod
    def preset(cls, name: str, pretrained: str | None) -> RefocusConfig:
        """The config of a checkpoint whose distraction dimensions are known, by open_clip's names for it.

        Raises:
            ValueError: for any other checkpoint, which must be calibrated.
        """
        from rfclip.presets import PRESETS  # which needs this class

        key = (plain_name(name), pretrained.lower() if pretrained else None)
        if key not in PRESETS:
            known = ", ".join(f"{model} with {weights!r}" if weights else model for model, weights in PRESETS)
            raise ValueError(
                f"the distraction dimensions of {name!r} with weights {pretrained!r} are not known (known: {known}). "
                "Find them with `rfclip calibrate IMAGES --model ... --pretrained ...`, then pass the file that it "
                "writes as --config, or a RefocusConfig in Python."
            )
        return PRESETS[key]


@dataclass(frozen=True)
class RegisterConfig:
    """What the method "registers" does to an image tower; `rfclip registers` finds a checkpoint's neurons.

    Attributes:
        neurons: the register neurons J, as pairs of a block's number, from 1, and a hidden unit of its MLP, from 0. If
            empty, there is no register either, and the method is its readout.
        threshold: what the norm of a token exceeds that is an outlier, at the output of the last block; None: twice the
            median over the picture's patches. The method itself does not read it.
        readout: the method whose last block turns tokens into patch embeddings, such as "kk-mean" or "clearclip"; that
            of "clip" is the ordinary one.
        per_neuron: whether each neuron's own largest activation moves to the register; by default one number, the
            largest of all neurons of a block, moves to each, as in the authors' code.

    Raises:
        ValueError: for a value of another kind.
    """

    neurons: tuple[tuple[int, int], ...]
    threshold: float | None = None
    readout: str = "kk-mean"
    per_neuron: bool = False

    def __post_init__(self) -> None:
        pairs = self.neurons if isinstance(self.neurons, Sequence) else (None,)
        if not all(map(_is_neuron, pairs)) or len({tuple(pair) for pair in pairs}) < len(pairs):
            raise ValueError(
                f"neurons={self.neurons!r}: expected distinct pairs of a block, from 1, and a hidden unit, from 0"
            )
        object.__setattr__(self, "neurons", tuple(sorted((block, unit) for block, unit in pairs)))
        if self.threshold is not None and not (is_finite(self.threshold) and self.threshold > 0):
            raise ValueError(f"threshold={self.threshold!r}: expected a positive number, or None")
        if not isinstance(self.readout, str):
            raise ValueError(f"readout={self.readout!r}: expected the name of a method")
        if not isinstance(self.per_neuron, bool):
            raise ValueError(f"per_neuron={self.per_neuron!r}: expected True or False")

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RegisterConfig:
        """What `to_json` wrote; omitted fields take their defaults.

        Raises:
            ValueError: for text that is not a JSON object of this class's fields.
        """
        return cls(**_object(text, "neurons", "pairs of block and unit", cls))


def _is_neuron(pair: object) -> bool:
    """Whether it is a block's number, from 1, and a hidden unit, from 0."""
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    return whole and pair[0] >= 1 and pair[1] >= 0


@dataclass(frozen=True)
class Origin:
    """What a file of settings says beside them: the checkpoint that they hold for, and where they are from.

    Attributes:
        model: as open_clip lists it, without the suffix that selects the activation, or with a prefix, such as
            "transformers:", as `rfclip.load_model` takes it.
        pretrained: tags of its weights, or their paths; none where the model's name tells.
        source: of the dimensions: the figure of a paper, or the pictures that they were calibrated on.
        date, version: of the calibration: the day, as 2026-01-31, and rfclip's version.

    Raises:
        ValueError: for a value that is none of these.
    """

    model: str | None = None
    pretrained: tuple[str, ...] | None = None
    source: str | None = None
    date: str | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "source", "version"):
            value = getattr(self, name)
            if value is not None and not _is_text(value):
                raise ValueError(f"{name}={value!r}: expected text")
        tags = self.pretrained
        if tags is not None:
            if not isinstance(tags, list | tuple) or not all(map(_is_text, tags)) or len({*tags}) < len(tags):
                raise ValueError(f"pretrained={tags!r}: expected a list of distinct tags of weights")
            object.__setattr__(self, "pretrained", tuple(tags))
        if self.date is not None and not _is_day(self.date):
            raise ValueError(f"date={self.date!r}: expected a day, such as 2026-01-31")

    def file_name(self) -> str:
        """A name for its file: the model's and the first weights', with dots for what names of files cannot hold."""
        return ".".join(map(_short, (self.model or "config", *(self.pretrained or ())[:1]))) + ".json"


def read_settings(text: str) -> tuple[RefocusConfig, Origin]:
    """What a file of settings holds; omitted fields take their defaults.

    Raises:
        ValueError: for text that is not a JSON object of the fields of these classes.
    """
    values = _object(text, "distraction_dims", "a list of dimensions", RefocusConfig, Origin)
    about = [field.name for field in fields(Origin)]
    origin = Origin(**{name: values.pop(name) for name in about if name in values})
    return RefocusConfig(**values), origin


def _object(text: str, least: str, what: str, *kinds: type) -> dict[str, Any]:
    """A JSON object of fields of some classes, with at least the field `least`, which is `what`; ValueError if not."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"a config must be JSON: {error}") from error
    if not isinstance(values, dict) or least not in values:
        raise ValueError(f'a config must be a JSON object with at least "{least}", {what}')
    known = [field.name for kind in kinds for field in fields(kind)]
    unknown = sorted(values.keys() - {*known})
    if unknown:
        raise ValueError(f"unknown in a config: {', '.join(unknown)}; known: {', '.join(known)}")
    return values


def is_finite(value: object) -> bool:
    """Whether a value is a number, Python's or NumPy's, neither NaN nor infinite, that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int of more than 308 digits
        return False


def check_precision(precision: str) -> None:
    """Raise ValueError for a precision that is none."""
    if precision not in get_args(PrecisionName):
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(get_args(PrecisionName))}")


def check_post(post: str | None) -> None:
    """Raise ValueError for a step after the windows that is none; None is what the protocol does."""
    if post is not None and post not in POSTS:
        raise ValueError(f"post={post!r}: expected one of {', '.join(POSTS)}, or None for what the protocol does")


def plain_name(name: str) -> str:
    """A model's name as open_clip lists it (ViT-B/16 is ViT-B-16), without the suffix that selects the activation."""
    return name if ":" in name else name.replace("/", "-").removesuffix("-quickgelu")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_day(value: object) -> bool:
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def _short(name: str) -> str:
    """A name of a model or of weights for a name of a file; of a path that exists, the last part."""
    path = Path(name.partition(":")[2] or name)
    name = path.absolute().name.removesuffix(".safetensors") if path.exists() else name
    return re.sub(r"[^\w.+-]+", ".", name).strip(".")


def _whole_numbers(name: str, values: object, least: int) -> tuple[int, ...]:
    """`values` as a sorted tuple of distinct ints."""
    numbers = tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (None,)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in numbers) or len({*numbers}) < len(
        numbers
    ):
        raise ValueError(f"{name}={values!r}: expected distinct whole numbers of at least {least}")
    return tuple(sorted(numbers))


# The norms over which the authors of test-time registers call a token an outlier, from their code's settings.
OUTLIER_NORMS = {("ViT-B-16", "openai"): 30.0, ("ViT-B-16", "laion2b_s34b_b88k"): 30.0}

PLAIN = RefocusConfig(distraction_dims=(), proxy="none")  # the tower as it is
