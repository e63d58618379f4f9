"""Rows of the tables of known failures against each other: each is found by its own example, none is slow on hostile text, none advises harm."""

import re
from collections.abc import Iterator
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

import pytest

from launcher.run.diagnosis import explain_log
from launcher.run.failures.symptom import KINDS, load_symptoms

SYMPTOMS = load_symptoms()
REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
FEW = 20  # a repeat up to here cannot make a search slow
MOST_REPEATS = 2  # unbounded ones of one branch: a search is at most as long as a line to this power
HARM = {
    r"\brm -r|--force\b.*\brm\b|\bmkfs|\bdd if=": "destroys data",
    r"verify[=_ ]*(false|no)\b|--trusted-host|insecure|-k\b.*curl|curl.*\s-k\b|SSL_VERIFY|verify_ssl": "switches TLS checks off",
    r"StrictHostKeyChecking|UserKnownHostsFile|ssh-keyscan": "switches host key checks off",
    r"--privileged|seccomp=unconfined|apparmor=unconfined|setenforce 0|chmod (?:-R )?777|chmod 666": "opens the node",
    r"\bkill -9|\bpkill|\bkillall|systemctl disable": "ends what is not ours",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- each other


@pytest.mark.parametrize("symptom", SYMPTOMS, ids=[symptom.name for symptom in SYMPTOMS])
def test_the_example_of_a_row_is_explained_by_that_row(symptom: Any) -> None:
    found = explain_log(symptom.example)
    assert found is not None and found.name == symptom.name, "another row comes first: put the more specific one first"


def test_a_second_row_for_the_same_example_says_less() -> None:
    """Where two rows match an example, the other one is of a later kind, or a more general row that stands below it."""
    order = {symptom.name: number for number, symptom in enumerate(SYMPTOMS)}
    for symptom in SYMPTOMS:
        others = [other for other in SYMPTOMS if other is not symptom and re.search(other.pattern, symptom.example, re.MULTILINE)]
        for other in others:
            assert (KINDS.index(symptom.kind), order[symptom.name]) < (KINDS.index(other.kind), order[other.name]), (
                symptom.name,
                other.name,
            )


def test_every_row_has_a_name_and_a_fix_of_its_own() -> None:
    assert len({symptom.name for symptom in SYMPTOMS}) == len(SYMPTOMS) >= 170
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", symptom.name) for symptom in SYMPTOMS)
    assert all(len(symptom.fix) < 400 for symptom in SYMPTOMS)


# ------------------------------------------------------------------------------------------------------- the language of patterns


def repeats(parsed: Any, inside: bool = False) -> Iterator[tuple[int, bool]]:
    """(most repetitions, whether it stands in another unbounded one) of each repeat that may vary by more than FEW."""
    for operator, argument in parsed:
        if operator in REPEATS:
            least, most, item = argument
            wide = most - least > FEW
            if wide:
                yield most, inside
            yield from repeats(item, inside or wide)
        elif operator is _constants.SUBPATTERN:
            yield from repeats(argument[3], inside)
        elif operator is _constants.BRANCH:
            for branch in argument[1]:
                yield from repeats(branch, inside)
        elif operator in (_constants.ASSERT, _constants.ASSERT_NOT):
            yield from repeats(argument[1], inside)


def branches(parsed: Any) -> list[Any]:
    """The alternatives of a pattern, where it has some at the top."""
    return list(parsed[0][1][1]) if len(parsed) == 1 and parsed[0][0] is _constants.BRANCH else [parsed]


@pytest.mark.parametrize("symptom", SYMPTOMS, ids=[symptom.name for symptom in SYMPTOMS])
def test_no_pattern_backtracks_without_bound(symptom: Any) -> None:
    """A repeat in a repeat takes exponential time on a line that does not match; several in a row polynomial time."""
    for branch in branches(_parser.parse(symptom.pattern)):
        found = list(repeats(branch))
        assert not any(nested for _, nested in found), "a repeat in a repeat"
        assert sum(most is _constants.MAXREPEAT for most, _ in found) <= MOST_REPEATS, "too many unbounded repeats in a row"


@pytest.mark.parametrize(
    ("pattern", "bad"),
    [(r"(a+)+b", True), (r"(?:\w+\s?)*:", True), (r"(?:[^\n]*\n){1,5}x", False), (r"x[^\n]*y", False), (r"(?=(a*)*)b", True)],
)
def test_the_check_of_patterns_sees_a_nested_repeat(pattern: str, bad: bool) -> None:
    assert any(nested for _, nested in repeats(_parser.parse(pattern))) is bad


# ----------------------------------------------------------------------------------------------------------------- advice


@pytest.mark.parametrize("symptom", SYMPTOMS, ids=[symptom.name for symptom in SYMPTOMS])
def test_no_advice_does_harm(symptom: Any) -> None:
    for pattern, reason in HARM.items():
        assert not re.search(pattern, symptom.fix, re.IGNORECASE), reason


# ------------------------------------------------------------------------------------------------------------------ lines

# Lines in shapes other than the examples of the rows -> the row.
LINES = {
    "docker: Error response from daemon: driver failed programming external connectivity on endpoint a (0ab): iptables failed: iptables --wait -t nat "
    "-A DOCKER -p tcp -d 0/0 --dport 9000 -j DNAT ! -i docker0: iptables: No chain/target/match by that name. (exit status 1).": "docker-firewall",
    "docker: Error response from daemon: driver failed programming external connectivity on endpoint b (1cd): Error starting userland proxy: listen "
    "tcp4 0.0.0.0:9001: bind: address already in use.": "docker-port",
    "torch.distributed.DistNetworkError: The client socket has failed to connect to any network address of (gpu-b, 29511). The client socket has "
    "failed to connect to [10.4.0.2]:29511 (errno: 113 - No route to host).": "rendezvous-unreachable",
    "RuntimeError: The client socket has failed to connect to any network address of (gpu-b, 29511). The client socket has failed to connect to "
    "gpu-b:29511 (errno: 110 - Connection timed out).": "rendezvous-silent",
    "[rank3]: torch.distributed.DistNetworkError: The client socket has failed to connect to [10.4.0.2]:29511 (errno: 111 - Connection refused).":
        "rendezvous-refused",
    "RuntimeError: The client socket has failed to connect to any network address of (head, 4711). The IPv4 network addresses of (head, 4711) cannot "
    "be retrieved (gai error: -3 - Temporary failure in name resolution).": "rendezvous-name",
    "[W119 socket.cpp:767] [c10d] The client socket cannot be initialized to connect to [head]:4711 (errno: 97).": None,
    "[W119 socket.cpp:752] [c10d] The client socket has failed to connect to [head]:4711 (errno: 113 - No route to host).": None,
    "UserWarning: CUDA initialization: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 802: system not yet initialized (Triggered internally at CUDAFunctions.cpp:108.)": "cuda-fabric-manager",
    "torch.AcceleratorError: CUDA error: CUDA-capable device" "(s) is/are busy or unavailable": "cuda-busy",
    "RuntimeError: NCCL communicator was aborted: CUDA error: uncorrectable NVLink error detected during the execution": "cuda-nvlink",
    "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.86": "cuda-driver-mismatch",
    "docker: Error response from daemon: failed to create task for container: failed to create shim task: OCI runtime create failed: runc create failed: "
    "unable to start container process: error during container init: error running prestart hook #0: exit status 1, stdout: , stderr: Auto-detected "
    "mode as 'legacy'\nnvidia-container-cli: mount error: failed to add device rules: unable to find any existing device filters attached to the cgroup: "
    "bpf_prog_query(BPF_CGROUP_DEVICE) failed: operation not permitted: unknown": "cuda-container-cgroup",
    "docker: Error response from daemon: CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=3": "cuda-container-cdi",
    "standard_init_linux.go:228: exec user process caused: exec format error": "docker-wrong-architecture",
    "OpenBLAS blas_thread_init: pthread_create failed for thread 3 of 64: Operation not permitted": "docker-threads",
    "failed to copy files: userspace copy failed: write /var/lib/docker/overlay2/ab/x.so: no space left on device": "docker-disk-full",
    "docker: Error response from daemon: failed to create task for container: ... error during container init: unable to init seccomp: error loading "
    "seccomp filter into kernel: unknown": "docker-seccomp",
    "WARNING: Retrying (Retry(total=4)) after connection broken by 'SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate "
    "verify failed: unable to get local issuer certificate (_ssl.c:1007)'))': /simple/torch/": "pip-certificate",
    "httpx.ConnectError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate": "hub-certificate",
    "[rank5]:[E1105 04:11:00 ProcessGroupNCCL.cpp:1413] [PG 3 Rank 5] Heartbeat monitor timed out! Process will be terminated.": "nccl-heartbeat",
    "node-b:991:1040 [3] ibvwrap.cc:262 NCCL WARN Call to ibv_modify_qp failed with error Connection timed out errno 110": "nccl-rdma-connect",
    "RuntimeError: NPU function error: aclrtSynchronizeEvent(event_), error code is 107020\n[ERROR] 2026-08-13 (PID:818, Device:5, RankID:-1) ERR00100 "
    "PTA call acl api failed.\nEE9999: Inner Error!": "npu-wait-timeout",
    "[W NPUStream.cpp:487] Warning: NPU warning, error code is 507001[Error]: \nEH9999: Inner Error!\n   The error from device(chipId:3, dieId:0), serial "
    "number is 2. there is a sdma error, sdma channel is 7": "npu-copy-fault",
    "RuntimeError: copy_d2d NPU function error: AclrtSynchronizeStreamWithTimeout(copy_stream), error code is 507001": "npu-scheduler",
    "RuntimeError: InnerRun NPU function error: aclnnMatmul, error code is 507011\nEI0006: [PID: 4] Getting socket times out.": "npu-stream-failed",
    "EI0009: [PID: 7] 2026-01-02 Transport init error. Reason: [Create][DestLink]Create Dest error! createLink para:rank[3]": "hccl-transport",
    "PermissionError: [Errno 13] Permission denied: '/data/kernel_meta/kernel_meta_1234'": "cann-working-folder",
    "PermissionError: [Errno 13] Permission denied: '/data/train.json'": "permission",
    "RuntimeError: unable to write to file </torch_7_1_0>: No space left on device (28)": "shared-memory",
    "OSError: [Errno 28] No space left on device": "disk-full",
}  # fmt: skip


@pytest.mark.parametrize(("text", "name"), LINES.items(), ids=[str(number) for number in range(len(LINES))])
def test_which_row_a_line_of_another_shape_shows(text: str, name: str | None) -> None:
    found = explain_log(text)
    assert (found.name if found else None) == name


def test_the_rows_of_a_file_say_what_it_is_for() -> None:
    folder = Path(__file__).resolve().parents[3] / "launcher/run/failures"
    for path in folder.glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# Known failures of "), path.name
