"""Rules about the stages after training: those that convert, merge or quantize weights, answer with a checkpoint, or serve it."""

from collections.abc import Iterator, Mapping
from ipaddress import ip_address

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.image.stack import Stack
from launcher.memory.states import device_count, spreads

# Kind of stage -> its section of options in conf/stage.
OPTIONS = {"merge": "merging", "convert": "conversion", "quantize": "quantization", "infer": "inference", "serve": "serving"}
LOOPBACK = ("127.0.0.1", "::1")  # where trainer.serving.endpoint asks for no token


def options_match_stage(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    wanted = OPTIONS.get(config.stage.kind)
    for kind, name in OPTIONS.items():
        given = getattr(config.stage, name) is not None
        if given != (name == wanted):
            what = (
                f"must be null: it has the options of stage={kind}"
                if given
                else f"is null, but stage {config.stage.name} is of kind {kind}"
            )
            yield Problem(key=f"stage.{name}", what=what, changes=(f"stage.{name}=null",) if given else (f"stage={kind}",))


def question_is_given(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    asked = config.stage.inference
    if asked is None:
        return
    if not asked.prompt and not asked.input:
        changes = ("stage.inference.prompt='What is this?' stage.inference.image=FILE", "stage.inference.input=FILE.jsonl")
        yield Problem(key="stage.inference.prompt", what="is empty, and so is stage.inference.input: there is no question", changes=changes)
    for name in ("prompt", "image"):
        if asked.input and getattr(asked, name):
            what = "is set together with stage.inference.input, whose rows have their own"
            yield Problem(key=f"stage.inference.{name}", what=what, changes=(f"stage.inference.{name}=''", "stage.inference.input=''"))


def sampling_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    for name in ("inference", "serving"):
        options = getattr(config.stage, name)
        if options is not None and options.sampling.beams > 1 and options.sampling.temperature:
            key = f"stage.{name}.sampling"
            what = f"{options.sampling.beams} beams are for a search, but temperature {options.sampling.temperature:g} samples tokens at random"
            yield Problem(key=f"{key}.beams", what=what, changes=(f"{key}.beams=1", f"{key}.temperature=0"))


def server_is_guarded(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Whoever reaches the port can use the model: from other machines, only with a token."""
    serving = config.stage.serving
    if serving is None:
        return
    try:
        ip_address(serving.address)
    except ValueError:
        what = f"{serving.address!r} is not an IP address; 127.0.0.1 serves this node only, 0.0.0.0 serves all of its networks"
        yield Problem(key="stage.serving.address", what=what, changes=("stage.serving.address=127.0.0.1",))
        return
    if serving.address not in LOOPBACK and not serving.token:
        what = (
            f"{serving.address} can be reached from other machines, unlike {' and '.join(LOOPBACK)}, and no token is required: set "
            "stage.serving.token to the name of an environment variable that holds one"
        )
        changes = ("stage.serving.token=OMNILAUNCH_TOKEN cluster.secrets=[OMNILAUNCH_TOKEN]", "stage.serving.address=127.0.0.1")
        yield Problem(key="stage.serving.address", what=what, changes=changes)
    if serving.token and serving.token not in config.cluster.secrets:
        secrets = ",".join((*config.cluster.secrets, serving.token))
        what = f"{serving.token} is not in cluster.secrets, so the node does not get its value"
        yield Problem(key="stage.serving.token", what=what, changes=(f"cluster.secrets=[{secrets}]",))


def spread_is_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    """Spreading a model needs several devices."""
    name = OPTIONS.get(config.stage.kind)
    if spreads(config) and config.hardware.accelerator != "cpu" and device_count(config) < 2:
        what = "auto spreads a model over the devices of a node, but this run uses one"
        yield Problem(key=f"stage.{name}.spread", what=what, changes=(f"stage.{name}.spread=one", "cluster.devices_per_node=2"))


def four_bits_are_possible(config: Config, _: Mapping[str, Stack]) -> Iterator[Problem]:
    quantization = config.stage.quantization
    if quantization is not None and quantization.scheme == "nf4" and config.hardware.accelerator != "cuda":
        what = f"nf4 needs bitsandbytes, which works on CUDA devices; {config.hardware.title} is {config.hardware.accelerator}"
        yield Problem(key="stage.quantization.scheme", what=what, changes=("stage.quantization.scheme=int8",))


INFERENCE_RULES: tuple[Rule, ...] = (
    options_match_stage,
    question_is_given,
    sampling_is_possible,
    server_is_guarded,
    spread_is_possible,
    four_bits_are_possible,
)
