"""Rules about model.source: that it names a place, and that no key is set which that place does not use."""

from collections.abc import Iterator, Mapping

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.image.stack import Stack
from launcher.redact import holds_credentials


def place_is_known(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """ModelScope is read by `omnilaunch model fetch` only: a run reads the folder that it made."""
    source, model = config.model.source, config.model
    if source.kind != "modelscope" or config.stage.checkpoint:
        return
    if not source.modelscope and not source.path:
        what = f"is empty: no repository of {model.title} on ModelScope is known to this project"
        yield Problem(
            key="model.source.modelscope", what=what, changes=("model.source.modelscope=ORGANISATION/NAME", "model.source.kind=hub")
        )
    elif not source.path:
        what = (
            f"{source.modelscope} of ModelScope is not on this machine yet, and a run reads it from a folder. "
            f"Next: omnilaunch model fetch {source.modelscope} --from modelscope, and then the same command"
        )
        yield Problem(key="model.source", what=what, changes=("model.source.path=FOLDER",), launch_only=True)


def keys_are_used(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    source = config.model.source
    if source.path and source.kind in ("hub", "random"):
        what = f"is set, but model.source.kind={source.kind} reads no folder"
        yield Problem(key="model.source.path", what=what, changes=("model.source.kind=path", "model.source.path=''"))
    if source.endpoint and source.kind != "hub":
        what = f"is the address of a Hugging Face hub, and model.source.kind={source.kind} does not use it"
        yield Problem(key="model.source.endpoint", what=what, changes=("model.source.endpoint=''", "model.source.kind=hub"))
    elif source.endpoint and (not source.endpoint.startswith(("http://", "https://")) or holds_credentials(source.endpoint)):
        what = "must be https://HOST, without user and password"
        yield Problem(key="model.source.endpoint", what=what, changes=("model.source.endpoint=''", "model.source.endpoint=https://HOST"))


def write_source_notes(config: Config) -> Iterator[str]:
    """A download at the start of a container is lost with the container, unless the user keeps the hub's cache elsewhere."""
    source, kept = config.model.source, {"HF_HOME", "HF_HUB_CACHE"} & set(config.cluster.environment)
    if source.kind == "hub" and config.cluster.runtime == "docker" and not config.stage.checkpoint and not kept:
        size = config.model.parameters.total * 2 / 1e9
        yield (
            f"each container downloads the weights at its start (about {size:.0f} GB in 16 bits) and keeps them only until it ends. To download "
            f"once: omnilaunch model fetch {source.id} --to FOLDER, then model.source.path=FOLDER (cluster.sync=[FOLDER] copies it to the nodes)"
        )


SOURCE_RULES: tuple[Rule, ...] = (place_is_known, keys_are_used)
