"""Whose fault failures are: forty histories whose cause is known, and the rules one by one."""

import random

import pytest

from megatron_qwen.attempts import Attempt
from megatron_qwen.resilience.blame import Fault
from megatron_qwen.resilience.evidence import FailureEvidence, Sign, evidence_of
from megatron_qwen.resilience.policy import AttemptOutcome, decide, excluded_nodes
from megatron_qwen.resilience.rules import Reason

NODES = tuple(f"n{number}" for number in range(1, 9))
PER_NODE = 4


class History:
    """Attempts of a run of four nodes out of eight, with four ranks a node, placed in blocks as Slurm places them.

    Args:
        seed: of everything that is drawn.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ended: list[Attempt] = []
        self.outcome = AttemptOutcome(Reason.FINISHED, "")
        self.decision = decide([], self.outcome, max_restarts_without_progress=3)

    def job(self, *, fixed=False) -> list[str]:
        """The nodes of the next attempt, without those that the run excludes."""
        free = [node for node in NODES if node not in self.decision.exclude]
        return free[:4] if fixed else sorted(self.random.sample(free, 4))

    def fails(self, nodes, reason, *, blamed=(), gained=20, **evidence):
        """An attempt ends so, after a checkpoint."""
        found = FailureEvidence(**evidence) if evidence else None
        saved = 10 * (len(self.ended) + 1)
        self.outcome = AttemptOutcome(reason, "so", tuple(blamed), None, saved, gained, saved, found, len(nodes))
        self.decision = decide(self.ended, self.outcome, max_restarts_without_progress=3)
        self.ended.append(
            Attempt(
                number=len(self.ended) + 1,
                started="2026-01-01T00:00:00+00:00",
                ended="2026-01-01T01:00:00+00:00",
                nodes=tuple(nodes),
                reason=str(reason),
                saved=saved,
                gained=gained,
                failed_nodes=tuple(blamed),
                evidence=None if found is None else found.as_dict(),
            )
        )

    def kills(self, nodes, rank, *, sign=Sign.KILLED, signal="SIGKILL", gained=20):
        node = nodes[rank // PER_NODE]
        self.fails(
            nodes, Reason.LOST_PEER, blamed=[node], gained=gained, sign=sign, rank=rank, node=node, signal=signal
        )

    def strays(self) -> None:
        """Ends that mean nothing, in between."""
        if self.random.random() < 0.5:
            self.fails(self.job(), self.random.choice([Reason.PREEMPTED, Reason.OUT_OF_TIME, Reason.REQUEUED]))


def program(seed: int) -> History:
    """One rank dies wherever it is, or after like intervals on one node, or as Slurm says for want of memory."""
    history = History(seed)
    rank, form = history.random.randrange(16), seed % 4
    for number in range(history.random.randint(2, 5) if form else 3):
        signal = history.random.choice(["SIGKILL", "SIGSEGV", "SIGABRT"])
        if form == 0:
            history.kills(history.job(), rank, signal=signal, gained=history.random.randint(1, 400))
        elif form == 1:
            history.kills(history.job(fixed=True), rank, gained=200 + history.random.randint(-8, 8))
        elif form == 2:
            history.kills(history.job(), history.random.randrange(16), sign=Sign.MEMORY)
        else:
            nodes = history.job()
            node = nodes[rank // PER_NODE]
            hang = {"sign": Sign.HUNG, "rank": rank, "node": node}
            if number % 2:
                history.fails(nodes, Reason.HANG, blamed=[node], **hang)
            else:
                history.kills(nodes, rank)
        history.strays()
    return history


def node(seed: int) -> History:
    """One node kills whatever runs on it, goes down, fails its check or reports broken hardware."""
    history = History(seed)
    bad, form = history.random.choice(NODES), seed % 5
    while bad not in history.decision.exclude and len(history.ended) < 12:
        nodes = history.job()
        if bad not in nodes:
            continue
        rank = nodes.index(bad) * PER_NODE + history.random.randrange(PER_NODE)
        if form == 0:
            history.kills(nodes, rank, gained=history.random.randint(1, 400))
        elif form == 1:
            history.fails(nodes, Reason.LOST_NODE, blamed=[bad], sign=Sign.DOWN, node=bad)
        elif form == 2:
            history.fails(nodes, Reason.UNHEALTHY_NODE, blamed=[bad], gained=0, sign=Sign.UNHEALTHY, node=bad)
        elif form == 3:
            found = {"found": ("Xid 79",), "rank": rank, "node": bad}
            history.fails(nodes, Reason.LOST_PEER, blamed=[bad], sign=Sign.HARDWARE, **found)
        elif history.random.random() < 0.5:
            history.fails(nodes, Reason.HANG, blamed=[bad], sign=Sign.HUNG, rank=rank, node=bad)
        else:
            history.kills(nodes, rank, gained=history.random.randint(1, 400))
        if bad not in history.decision.exclude:
            history.strays()
    return history


def storage(seed: int) -> History:
    """The file system of the run fails, as its controller or as ranks on several nodes see it."""
    history = History(seed)
    for number in range(history.random.randint(2, 4)):
        nodes = history.job()
        if seed % 2:
            history.fails(nodes, Reason.STORAGE, gained=0)
        else:
            place = NODES[(number + seed) % 8]
            history.fails(nodes, Reason.LOST_PEER, blamed=[place], sign=Sign.FILES, rank=0, node=place)
    return history


def network(seed: int) -> History:
    """Connections break between changing nodes, and no process has died."""
    history = History(seed)
    for number in range(history.random.randint(1, 4)):
        nodes = history.job()
        first, second = (nodes[0], nodes[1]) if number % 2 else (nodes[2], nodes[3])
        ends = (first, second) if seed % 2 else ()
        history.fails(nodes, Reason.LOST_PEER, sign=Sign.CONNECTION, rank=nodes.index(first), node=first, ends=ends)
    return history


CAUSES = {Fault.PROGRAM: program, Fault.NODE: node, Fault.STORAGE: storage, Fault.NETWORK: network}


def last_failure(history: History) -> Fault | None:
    """The fault that was found at the newest end that was a failure."""
    earlier = [one for one in history.ended if one.reason not in ("preempted", "out of time", "requeued by hand")]
    newest = earlier.pop()
    again = AttemptOutcome(
        Reason(str(newest.reason)),
        "",
        newest.failed_nodes,
        None,
        newest.iteration,
        newest.gained or 0,
        newest.saved or 0,
        evidence_of(newest.evidence),
        len(newest.nodes),
    )
    blame = decide(earlier, again, max_restarts_without_progress=9).blame
    return None if blame is None else blame.fault


def test_forty_histories():
    wrong = []
    for cause, made in CAUSES.items():
        for seed in range(10):
            history = made(seed)
            if last_failure(history) is not cause:
                wrong.append((cause, seed, last_failure(history), history.decision.why))
            if cause is not Fault.NODE:
                assert history.decision.exclude == (), "no healthy node is avoided"
            else:
                assert len(history.decision.exclude) == 1, history.ended
    assert len(wrong) <= 2, wrong


def test_a_thousand_other_histories():
    """The share is no accident of ten seeds."""
    right = {cause: sum(last_failure(made(seed)) is cause for seed in range(10, 260)) for cause, made in CAUSES.items()}
    assert min(right.values()) >= 238, right


def kill(history: History, rank: int, places: str, steps=(20, 90, 50)) -> None:
    for place, gained in zip(places, steps, strict=False):
        nodes = ["n1", f"n{place}"]
        history.fails(
            nodes, Reason.LOST_PEER, blamed=nodes[1:], gained=gained, sign=Sign.KILLED, rank=rank, node=nodes[1],
            signal="SIGKILL",
        )  # fmt: skip


def test_a_rank_that_takes_its_death_along():
    history = History(0)
    kill(history, 3, "2")
    assert history.decision.blame.fault is Fault.UNKNOWN
    assert "suspected" not in history.decision.why
    kill(history, 3, "34")
    assert history.decision.blame.fault is Fault.PROGRAM
    assert "the program is suspected: rank 3 was killed by SIGKILL 3 times on n2, n3 and n4" in history.decision.why
    assert "memory_per_rank_gib" in history.decision.why
    assert history.decision.exclude == ()


def test_a_node_is_cleared_when_the_rank_dies_elsewhere_too():
    history = History(0)
    kill(history, 1, "22")
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.NODE, ("n2",))
    kill(history, 1, "3")
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.PROGRAM, ())
    assert history.decision.blame.cleared == ("n2", "n3")


@pytest.mark.parametrize(
    ("steps", "fault"),
    [((100, 104), Fault.PROGRAM), ((100, 140), Fault.NODE), ((13, 15), Fault.PROGRAM), ((0, 0), Fault.NODE)],
)
def test_like_intervals_on_one_node(steps, fault):
    history = History(0)
    kill(history, 1, "22", steps)
    assert history.decision.blame.fault is fault
    assert history.decision.exclude == (("n2",) if fault is Fault.NODE else ())


def test_other_ranks_of_the_node_die_as_well():
    history = History(0)
    kill(history, 1, "22", (100, 101))
    kill(history, 2, "2", (50,))
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.NODE, ("n2",))
    assert "n2 has failed 3 times (ranks 1 and 2)" in history.decision.why


def test_long_attempts_are_compared_by_seconds():
    for seconds, fault in ((7260.0, Fault.PROGRAM), (9000.0, Fault.NODE)):
        history = History(0)
        for gained, after in ((20, 7200.0), (900, seconds)):
            evidence = {"sign": Sign.KILLED, "rank": 1, "node": "n2", "seconds": after}
            history.fails(["n1", "n2"], Reason.LOST_PEER, blamed=["n2"], gained=gained, **evidence)
        assert history.decision.blame.fault is fault


def test_memory_that_runs_out_on_one_node_only():
    history = History(0)
    nodes = [f"n{number}" for number in range(1, 33)]
    for rank in (4, 6):
        history.kills(nodes, rank, sign=Sign.MEMORY)
        assert (history.decision.blame.fault, history.decision.exclude) == (Fault.PROGRAM, ())
    history.kills(nodes, 5, sign=Sign.MEMORY)
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.NODE, ("n2",))
    assert "something else uses its memory" in history.decision.why


def test_the_end_that_lost_connections_share():
    history = History(0)
    for ends in (("n1", "n3"), ("n4", "n3"), ("n3", "n2"), ("n3", "n1"), ("n3", "n4")):
        assert history.decision.exclude == (), "of four nodes two have often one in common"
        history.fails(NODES[:4], Reason.LOST_PEER, sign=Sign.CONNECTION, rank=0, node=ends[0], ends=ends)
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.NETWORK, ("n3",))
    history = History(0)
    for ends in (("n1", "n3"), ("n4", "n3")):
        many = [f"n{number}" for number in range(1, 101)]
        history.fails(many, Reason.LOST_PEER, sign=Sign.CONNECTION, rank=0, node=ends[0], ends=ends)
    assert history.decision.exclude == ("n3",)
    links = History(0)
    for _ in range(2):  # whose counters have moved: no chance
        assert links.decision.exclude == ()
        links.fails(NODES[:4], Reason.LOST_PEER, sign=Sign.CONNECTION, rank=0, node="n1", ends=("n3",))
    assert links.decision.exclude == ("n3",)
    two = History(0)
    for _ in range(3):  # of a job of two nodes, both of them are always an end
        two.fails(["n1", "n2"], Reason.LOST_PEER, sign=Sign.CONNECTION, rank=0, node="n1", ends=("n1", "n2"))
    assert (two.decision.blame.fault, two.decision.exclude) == (Fault.NETWORK, ())


def test_a_device_that_reports_errors_outweighs_the_exception():
    history = History(0)
    history.fails(NODES[:4], Reason.ERROR, blamed=["n2"], sign=Sign.HARDWARE, node="n2", found=("Xid 48",))
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.NODE, ("n2",))
    history = History(0)
    history.fails(NODES[:4], Reason.ERROR, sign=Sign.ERROR, rank=5, node="n2")
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.PROGRAM, ())


def test_one_rank_that_fails_twice_on_a_node_leaves_a_doubt():
    """Restarts put it there again; on another node it shows whose fault that is."""
    history = History(0)
    kill(history, 1, "22")
    assert (history.decision.exclude, history.decision.blame.doubtful) == (("n2",), ("n2",))
    kill(history, 2, "2")
    assert (history.decision.exclude, history.decision.blame.doubtful) == (("n2",), ())
    history = History(0)
    kill(history, 1, "2")
    history.fails(["n1", "n2"], Reason.LOST_NODE, blamed=["n2"], sign=Sign.DOWN, node="n2")
    assert (history.decision.exclude, history.decision.blame.doubtful) == (("n2",), ())


def files(history: History, *nodes: str, forgotten: bool = False) -> None:
    """File systems of these nodes fail; ``forgotten``: too long ago, or the node was lifted since."""
    for node in nodes:
        blamed = [] if forgotten else [node]
        history.fails(NODES[:4], Reason.LOST_PEER, blamed=blamed, sign=Sign.FILES, rank=0, node=node)


def test_a_node_is_cleared_when_the_storage_is_found_out():
    history = History(0)
    files(history, "n2", "n2")
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.NODE, ("n2",))
    files(history, "n3")
    blame = history.decision.blame
    assert (blame.fault, blame.avoid, blame.cleared) == (Fault.STORAGE, (), ("n2", "n3"))


def test_what_counts_no_longer_excludes_no_node():
    history = History(0)
    files(history, "n2", forgotten=True)
    files(history, "n2")
    assert history.decision.exclude == (), "one failure that counts"
    files(history, "n2")
    assert history.decision.exclude == ("n2",)
    history = History(0)
    files(history, "n2", "n2", "n3", forgotten=True)
    files(history, "n4")
    assert (history.decision.blame.fault, history.decision.exclude) == (Fault.NODE, ())
    history, nodes = History(0), [f"n{number}" for number in range(1, 33)]
    memory = {"sign": Sign.MEMORY, "node": "n2"}
    for rank in (4, 5, 6):
        history.fails(nodes, Reason.LOST_PEER, rank=rank, **memory)
    assert history.decision.exclude == ()
    for rank, excluded in ((4, ()), (5, ()), (7, ("n2",))):
        history.fails(nodes, Reason.LOST_PEER, blamed=["n2"], rank=rank, **memory)
        assert history.decision.exclude == excluded


def test_what_is_kept_is_read_again():
    told = FailureEvidence(Sign.MEMORY, 3, "n2", "SIGKILL", None, 61.2, ("n1",), ("Xid 79",))
    assert evidence_of(told.as_dict()) == told
    assert "rank 3 on n2 failed first" in str(told)
    for other in (None, [], {}, {"sign": "of the times"}):
        assert evidence_of(other) is None
    odd = {"sign": "down", "rank": "x", "seconds": None, "ends": 4}
    assert evidence_of({**odd, "sign": str(Sign.DOWN)}) == FailureEvidence(Sign.DOWN)


def test_failures_without_evidence_count_as_before():
    """Of attempts that an older version recorded."""
    old = [
        Attempt(number=number, started="2026-01-01T00:00:00+00:00", reason="lost peer", failed_nodes=("n1",))
        for number in (1, 2)
    ]
    assert excluded_nodes(old[:1]) == ()
    assert excluded_nodes(old) == ("n1",)
