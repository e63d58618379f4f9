"""Which parameter groups a chain of stages has trained."""

from trainer.contract import StageSpec, WeightsLineage


def groups_before(lineage: WeightsLineage, stage: StageSpec) -> tuple[str, ...]:
    """Groups that are trained when the stage begins: those of earlier stages, without those that are reset."""
    return tuple(group for group in lineage.trained if group not in stage.reset)


def groups_trained(lineage: WeightsLineage, stage: StageSpec) -> tuple[str, ...]:
    """Groups that are trained when the stage ends."""
    lm = ("lm",) if stage.lora is not None else ()
    return tuple(dict.fromkeys((*groups_before(lineage, stage), *stage.trainable, *lm)))
