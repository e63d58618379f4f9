"""Rules about what comes after training: stages that rewrite a checkpoint's weights, answer with it, or serve it."""

from collections.abc import Iterator, Mapping
from ipaddress import ip_address

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.image.stack import Stack
from launcher.memory.states import device_count, spreads

# Kind of stage -> its options, which conf/stage gives.
OPTIONS = {"merge": "merging", "convert": "conversion", "quantize": "quantization", "infer": "inference", "serve": "serving"}
LOOPBACK = ("127.0.0.1", "::1")  # where trainer.serving.endpoint asks for no token


def options_are_there(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    wanted = OPTIONS.get(config.stage.kind)
    for kind, name in OPTIONS.items():
        given = getattr(config.stage, name) is not None
        if given != (name == wanted):
            what = f"is null, and stage {config.stage.name} is of kind {kind}" if not given else f"are options of stage={kind}, and nothing here"
            yield Problem(key=f"stage.{name}", what=what, changes=(f"stage={kind}",) if not given else (f"stage.{name}=null",))


def question_is_named(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    asked = config.stage.inference
    if asked is None:
        return
    if not asked.prompt and not asked.input:
        changes = ("stage.inference.prompt='What is this?' stage.inference.image=FILE", "stage.inference.input=FILE.jsonl")
        yield Problem(key="stage.inference.prompt", what="is empty, and so is stage.inference.input: nothing is asked", changes=changes)
    for name in ("prompt", "image"):
        if asked.input and getattr(asked, name):
            what = "is named beside stage.inference.input, whose rows have their own"
            yield Problem(key=f"stage.inference.{name}", what=what, changes=(f"stage.inference.{name}=''", "stage.inference.input=''"))


def sampling_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    for name in ("inference", "serving"):
        options = getattr(config.stage, name)
        if options is not None and options.sampling.beams > 1 and options.sampling.temperature:
            key = f"stage.{name}.sampling"
            what = f"{options.sampling.beams} beams are searched, and with temperature {options.sampling.temperature:g} tokens are drawn"
            yield Problem(key=f"{key}.beams", what=what, changes=(f"{key}.beams=1", f"{key}.temperature=0"))


def server_is_guarded(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Who reaches the port reaches the model: from other machines with a token alone."""
    serving = config.stage.serving
    if serving is None:
        return
    try:
        ip_address(serving.address)
    except ValueError:
        what = f"{serving.address!r} is no IP address; 127.0.0.1 is this node alone, 0.0.0.0 all of its networks"
        yield Problem(key="stage.serving.address", what=what, changes=("stage.serving.address=127.0.0.1",))
        return
    if serving.address not in LOOPBACK and not serving.token:
        what = (
            f"{serving.address} can be reached from other machines, unlike {' and '.join(LOOPBACK)}, and no token is asked: name a "
            "variable of your environment that holds one"
        )
        changes = ("stage.serving.token=OMNILAUNCH_TOKEN cluster.secrets=[OMNILAUNCH_TOKEN]", "stage.serving.address=127.0.0.1")
        yield Problem(key="stage.serving.address", what=what, changes=changes)
    if serving.token and serving.token not in config.cluster.secrets:
        secrets = ",".join((*config.cluster.secrets, serving.token))
        what = f"{serving.token} is the name of no secret that the node is given"
        yield Problem(key="stage.serving.token", what=what, changes=(f"cluster.secrets=[{secrets}]",))


def spread_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Whole layers over several cards need several."""
    name = OPTIONS.get(config.stage.kind)
    if spreads(config) and config.hardware.accelerator != "cpu" and device_count(config) < 2:
        what = "auto spreads a model over the cards of a node, and one is used here"
        yield Problem(key=f"stage.{name}.spread", what=what, changes=(f"stage.{name}.spread=one", "cluster.devices_per_node=2"))


def four_bits_are_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    quantization = config.stage.quantization
    if quantization is not None and quantization.scheme == "nf4" and config.hardware.accelerator != "cuda":
        what = f"nf4 is bitsandbytes', which serves CUDA devices; {config.hardware.title} is {config.hardware.accelerator}"
        yield Problem(key="stage.quantization.scheme", what=what, changes=("stage.quantization.scheme=int8",))


def write_deployment_notes(config: Config) -> Iterator[str]:
    """What a reader of the plan should know of weights that were made for another type than the chip has."""
    half = config.precision.weights == "float16" and config.hardware.capability.bf16 == "none"
    if half and config.model.source.kind == "hub" and not config.stage.checkpoint and config.stage.kind != "convert":
        words = f"omnilaunch launch stage=convert model={config.model.name} hardware=cpu"
        yield (
            f"{config.model.source.id} is published in bfloat16, which {config.hardware.title} does not have, and not every value of it is "
            f"one of float16: convert it once and read which are not, with {words}; then name that run here: stage.checkpoint=RUN_ID"
        )


DEPLOYMENT_RULES: tuple[Rule, ...] = (
    options_are_there,
    question_is_named,
    sampling_is_possible,
    server_is_guarded,
    spread_is_possible,
    four_bits_are_possible,
)
