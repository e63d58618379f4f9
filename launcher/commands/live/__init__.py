"""The verbs for a run that was launched earlier: attach, stop, status, logs, and explain, which reads any log; and `launch --resume`.

Read `live_run` first: it reads the plan and the record in the run's folder, and connects to the nodes of the run.
"""
