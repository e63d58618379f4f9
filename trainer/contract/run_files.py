"""The names of the files in a run's folder, `runs/<run_id>/`, and the lines of a rank's log that the launcher reads."""

SPEC_FILE = "spec.json"
DATA_FILE = "data.json"
DATA_PENDING_FILE = "data.pending"  # empty; written by the launcher with the spec, removed by the data check when it has passed
DATA_PROBLEMS_FILE = "data_problems.jsonl"  # all problems; data.json has the first ones
DATA_LEFT_OUT_FILE = "data_left_out.jsonl"  # rows that are not used, or not as they are written; the ranks read which ones to leave out
INPUTS_FILE = "inputs.json"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
ANSWERS_FILE = "answers.jsonl"  # of stage infer
STREAM_FILE = "answer.txt"  # stage infer with one question: the text as it is generated
IMAGES_FILE = "images.txt"  # stage infer: one sentence about how they are put into the questions
SERVING_FILE = "serving.json"  # of stage serve, once the model is ready
RESULT_FILE = "train_result.json"
FAILURE_FILES = "failure-rank{rank}.json"
CHECKPOINTS = "checkpoints"
EVALUATIONS_FILE = "evaluations.jsonl"  # one row per evaluation; the last one is of the last step
SAMPLES_FOLDER = "samples"  # and the answers of each evaluation: step-<n>.jsonl
BEST_FILE = "best.json"
TRACKER_FOLDER = "tracker"  # with one folder for each of spec.trackers
PROFILE_FOLDER = "profile"

# The prefix of every line of a rank, where there are several ranks; and the line that a rank prints when it begins a phase of its start.
RANK_PREFIX = "[rank {rank}] "
PHASE_LINE = "omnilaunch: starting: {phase}"
START_PHASES = ("loading its libraries", "meeting the other ranks", "reading the data", "loading the model", "preparing the engine")
