"""What the launcher and the trainer share: the spec of a run, the reports that it writes, and the names of its files.

Standard library only. Read `spec` first; `options` has the sections of evaluation and of the stages after training, `rows` the reports
(`problem_group`: problems of data as text, `listing`: long lists), `run_files` the file names, `codec` reading and writing,
`environment_facts` the comparison of two environments. `checkpoint_files`, `adapter_files`, `weight_files` and `annotation_file` inspect files
without torch, and `row_sets` finds those of the data. The launcher imports only this package of the trainer; the trainer never imports the launcher.
"""

from trainer.contract.codec import *  # noqa: F403
from trainer.contract.environment_facts import *  # noqa: F403
from trainer.contract.options import *  # noqa: F403
from trainer.contract.problem_group import *  # noqa: F403
from trainer.contract.rows import *  # noqa: F403
from trainer.contract.run_files import *  # noqa: F403
from trainer.contract.spec import *  # noqa: F403
