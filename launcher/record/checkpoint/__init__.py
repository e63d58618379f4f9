"""What a checkpoint of an earlier run is, and the config of a run that starts from it.

First read `checkpoint_config`: it composes the config with what the record says. `checkpoint_record` reads that from the run's plan.json and from
the files of the checkpoint. Where the checkpoint is, is found by launcher.record.checkpoint_reference.
"""
