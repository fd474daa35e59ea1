"""Checkpoints whose distraction dimensions are known: one JSON file each, as `rfclip calibrate` writes it."""

from __future__ import annotations

from pathlib import Path

from rfclip.config import RefocusConfig, plain_name, read_settings

FOLDER = Path(__file__).parent


def read_presets(folder: Path) -> dict[tuple[str, str | None], RefocusConfig]:
    """The settings in a folder's files, by the model's plain name and the tag of its weights, in lower case.

    Raises:
        ValueError: a file is none of settings, lacks the checkpoint or the source, or has one that another has too.
    """
    found: dict[tuple[str, str | None], RefocusConfig] = {}
    files: dict[tuple[str, str | None], Path] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            config, origin = read_settings(path.read_text("utf-8"))
            if origin.model is None or origin.pretrained is None or origin.source is None:
                missing = [name for name in ("model", "pretrained", "source") if getattr(origin, name) is None]
                raise ValueError(f"a preset needs {', '.join(missing)} as well")
            for tag in origin.pretrained or (None,):
                key = plain_name(origin.model), tag and tag.lower()
                if key in found:
                    raise ValueError(f"{' with '.join(filter(None, key))} is in {files[key].name} as well")
                found[key], files[key] = config, path
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return found


PRESETS = read_presets(FOLDER)
