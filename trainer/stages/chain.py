"""What a chain of stages has trained, group by group."""

from trainer.contract import WeightsLineage, StageSpec


def groups_before(origin: WeightsLineage, stage: StageSpec) -> tuple[str, ...]:
    """Groups that are trained when the stage begins: what came before, without what begins anew."""
    return tuple(group for group in origin.trained if group not in stage.reset)


def groups_trained(origin: WeightsLineage, stage: StageSpec) -> tuple[str, ...]:
    """The same when it is through."""
    lm = ("lm",) if stage.lora is not None else ()
    return tuple(dict.fromkeys((*groups_before(origin, stage), *stage.trainable, *lm)))
