"""All model families by name."""

from trainer.contract import InputRefused
from trainer.models.added_token import with_added_tokens
from trainer.models.chat_template import with_chat_template
from trainer.models.family import Family
from trainer.models.internvl import INTERNVL
from trainer.models.llava import LLAVA
from trainer.models.minicpm_v_4_6 import MINICPM_V_4_6
from trainer.models.openbmb.minicpm_v import MINICPM_O_2_6, MINICPM_V_2_6
from trainer.models.openbmb.omnilmm import OMNILMM
from trainer.models.openbmb.omnilmm_3b import OMNILMM_3B
from trainer.models.qwen2_5_omni import QWEN2_5_OMNI
from trainer.models.qwen2_5_vl import QWEN2_5_VL

OPENBMB = (MINICPM_V_4_6, MINICPM_V_2_6, MINICPM_O_2_6, OMNILMM, OMNILMM_3B)
FAMILIES = {family.name: family for family in (LLAVA, QWEN2_5_VL, INTERNVL, QWEN2_5_OMNI, *OPENBMB)}


def find_family(name: str) -> Family:
    """Raises InputRefused with the names of all families for an unknown one."""
    if name not in FAMILIES:
        raise InputRefused(f"model.family: {name!r} is not a family of the trainer; valid families: {', '.join(sorted(FAMILIES))}")
    return with_chat_template(with_added_tokens(FAMILIES[name]))
