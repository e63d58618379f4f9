"""The folders in which models are found on this machine, and what `model.source` of a config becomes there."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.config.schema import Config
from launcher.weights.endpoint import clean_endpoint
from launcher.weights.manifest import HubKind
from trainer.contract.weight_files import MANIFEST_FILE

MODELS_VARIABLE = "OMNILAUNCH_MODELS"


def models_folder(environ: Mapping[str, str]) -> Path:
    """Where `omnilaunch model fetch` writes to without --to: OMNILAUNCH_MODELS, or below the user's cache folder."""
    if given := environ.get(MODELS_VARIABLE, "").strip():
        return Path(given).expanduser().absolute()
    return Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/") / ".cache") / "omnilaunch" / "models"


def fetched_folder(kind: HubKind, name: str, environ: Mapping[str, str]) -> Path:
    """The folder of one repository below `models_folder`."""
    return models_folder(environ) / kind / name


def find_cached(kind: HubKind, name: str, environ: Mapping[str, str]) -> str:
    """A folder on this machine that holds the repository, or '': fetched by us, or in the cache of huggingface_hub or modelscope."""
    own = fetched_folder(kind, name, environ)
    if (own / MANIFEST_FILE).is_file():
        return str(own)
    cache = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "/") / ".cache")
    if kind == "hub":
        hub = Path(environ.get("HF_HUB_CACHE") or Path(environ.get("HF_HOME") or cache / "huggingface") / "hub")
        snapshots = sorted((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))
        return str(snapshots[-1].parent) if snapshots else ""
    root = Path(environ.get("MODELSCOPE_CACHE") or cache / "modelscope" / "hub")
    for folder in (root / "models", root, root / "hub" / "models", root / "hub"):
        for spelled in (name, name.replace(".", "___")):  # modelscope replaces dots in the names of its folders
            if (folder / spelled / "config.json").is_file():
                return str(folder / spelled)
    return ""


def with_weights_folder(config: Config, environ: Mapping[str, str]) -> Config:
    """The config with what this machine adds to model.source: for ModelScope the fetched folder, if it is here, and its copy to the nodes; for
    the Hugging Face hub the mirror in HF_ENDPOINT. Raises ConfigRefused for an HF_ENDPOINT that is no address."""
    source, cluster = config.model.source, config.cluster
    if source.kind == "hub" and not source.endpoint and (mirror := environ.get("HF_ENDPOINT", "").strip()):
        source = replace(source, endpoint=clean_endpoint(mirror))
    if source.kind == "modelscope" and not source.path and source.modelscope and not config.stage.checkpoint:
        folder = fetched_folder("modelscope", source.modelscope, environ)
        if (folder / MANIFEST_FILE).is_file():
            source = replace(source, path=str(folder))
            if not cluster.is_local and not cluster.shared:
                cluster = replace(cluster, sync=tuple(dict.fromkeys((*cluster.sync, str(folder)))))
    if source is config.model.source:
        return config
    return replace(config, model=replace(config.model, source=source), cluster=cluster)
