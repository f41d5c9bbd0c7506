"""Scoring groups: worker processes that hang, crash and are replaced; user functions; sums."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from waiting import wait_until

from gft_lite.rewards import user_calls, worker_pool
from gft_lite.rewards.base import RewardError, RewardFunction
from gft_lite.rewards.registry import JUDGE, REWARDS, load_function, make_rule
from gft_lite.rewards.scorer import Scorer
from gft_lite.rewards.user_function import UserFunction
from gft_lite.types import Group, Problem, Response

HANG = {"pattern": "(a+)+$"}
HANGING_TEXT = "a" * 60 + "b"


def group(texts, answer="5", **columns):
    problem = Problem(id="p", text="What is it?", answer=answer, columns=columns)
    sources = ["expert", "teacher"] + ["self"] * len(texts)
    responses = [Response((7, index), text, sources[index]) for index, text in enumerate(texts)]
    return Group(problem, tuple(responses))


def verdicts(scored):
    return [response.verdict for g in scored for response in g]


def signal_when_hanging(pid, number):
    """Send a signal to a worker after a third of a second of CPU time: it grades HANGING_TEXT."""
    base = cpu_seconds(pid)

    def watch():
        while cpu_seconds(pid) < base + 0.3:
            time.sleep(0.02)
        os.kill(pid, number)

    threading.Thread(target=watch, daemon=True).start()


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        user, system = stat.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def rewards(scored):
    return [reward for g in scored for reward in g.rewards]


@pytest.fixture(scope="module")
def math_scorer():
    with Scorer([RewardFunction("math")], workers=2) as scorer:
        yield scorer


def test_golden_pairs(math_scorer, shared_data):
    lines = (shared_data / "grader_golden_dev.jsonl").read_text(encoding="utf-8").split("\n")
    pairs = [json.loads(line) for line in lines if line]
    scored = math_scorer.score(
        [group([p["response"]], p["answer"], answer_type=p["answer_type"]) for p in pairs]
    )
    wrong = [p["id"] for p, got in zip(pairs, rewards(scored), strict=True) if got != p["expected"]]
    assert len(pairs) > 200
    assert wrong == []


def test_real_golds_equal_themselves(math_scorer, shared_data):
    golds = []
    for path in sorted((shared_data / "bench").glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        usable = [r["answer"] for r in found if r["answer_type"] == "math" and r["answer"]]
        golds += random.Random(0).sample(usable, min(len(usable), 300))
    scored = math_scorer.score([group([rf"Thus $\boxed{{ {gold} }}$."], gold) for gold in golds])
    wrong = [g for g, reward in zip(golds, rewards(scored), strict=True) if reward != 1]
    assert len(golds) > 1000
    assert wrong == []


def test_every_response_is_scored_and_nothing_is_mutated(math_scorer):
    before = group([r"\boxed{5}", r"\boxed{6}", "none", r"\boxed{9^{9^{9}}}", ""])
    copy = dataclasses.replace(before)
    (after,) = math_scorer.score([before])
    assert before == copy and before.responses[0].reward is None
    assert after.rewards == (1, 0, 0, 0, 0)
    assert verdicts([after]) == ["ok", "ok", "no_answer", "unparsed", "no_answer"]
    assert [r.source for r in after] == ["expert", "teacher", "self", "self", "self"]
    assert [r.token_ids for r in after] == [r.token_ids for r in before]
    assert after.responses[0].reward_parts == {"math": 1.0}


def test_truncated_and_missing_answers(math_scorer):
    cut = Response((1,), r"\boxed{5} and", "self", finish_reason="length")
    truncated = Group(Problem("p", "q", "5"), (cut,))
    scored = math_scorer.score([truncated, group([r"\boxed{5}"], None)])
    assert rewards(scored) == [1, None]
    assert verdicts(scored) == ["ok", "not_applicable"]
    assert scored[1].responses[0].correct is None
    assert math_scorer.score([]) == []
    empty = Group(Problem("p", "q", "5"), ())
    assert math_scorer.score([empty]) == [empty]


@pytest.fixture
def cpu_limit_only(monkeypatch):
    """A limit on the wall clock that no ordinary item of a busy machine reaches."""
    monkeypatch.setattr(worker_pool, "WALL_FACTOR", 60.0)


def test_a_hung_item_is_killed_alone_and_its_worker_replaced(cpu_limit_only):
    with Scorer([RewardFunction("format", parameters=HANG)], workers=2, timeout=1.0) as scorer:
        scorer.score([group(["a", "b"])])
        before = set(scorer._pool.pids)
        texts = ["a" * n for n in range(1, 30)]
        scored = scorer.score([group([*texts, HANGING_TEXT, *["b" * n for n in range(1, 30)]])])
        assert rewards(scored) == [1] * 29 + [0] * 30
        assert verdicts(scored) == ["ok"] * 29 + ["timeout"] + ["ok"] * 29
        assert rewards(scorer.score([group(["aaa" * 30, "c" * 9])])) == [1, 0]
        after = set(scorer._pool.pids)
        assert len(before & after) <= 1 and len(after) >= 1
        for pid in before - after:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        # a timeout is not cached
        assert verdicts(scorer.score([group([HANGING_TEXT])])) == ["timeout"]


def test_hanging_mathematics_is_killed_alone(cpu_limit_only):
    cells = [[f"{a}+{b}^{{{n}}}" for b in "abcdefg"] for n, a in enumerate("abcdefg")]
    matrix = r"\begin{vmatrix}" + r"\\".join("&".join(row) for row in cells) + r"\end{vmatrix}"
    texts = [r"\boxed{1+x^2}", r"\boxed{(9999!)^{9999}}", rf"\boxed{{{matrix}}}", r"\boxed{x^2+1}"]
    with Scorer([RewardFunction("math")], workers=2, timeout=1.5) as scorer:
        scored = scorer.score([group(texts, "x^2 + 1")])
    assert verdicts(scored) == ["ok", "timeout", "timeout", "ok"]
    assert rewards(scored) == [1, 0, 0, 1]


def test_a_stopped_worker_is_killed_by_the_wall_clock():
    with Scorer([RewardFunction("format", parameters=HANG)], workers=1, timeout=1.0) as scorer:
        scorer.score([group(["a"])])
        (pid,) = scorer._pool.pids
        signal_when_hanging(pid, signal.SIGSTOP)
        assert verdicts(scorer.score([group([HANGING_TEXT, "aa"])])) == ["timeout", "ok"]


def test_the_alarm_of_a_worker_itself_is_a_timeout():
    """As when this process has not run since the limit, for instance on a suspended machine."""
    with Scorer([RewardFunction("format", parameters=HANG)], workers=1, timeout=60.0) as scorer:
        scorer.score([group(["a"])])
        signal_when_hanging(*scorer._pool.pids, signal.SIGALRM)
        assert verdicts(scorer.score([group([HANGING_TEXT, "aa"])])) == ["timeout", "ok"]


def test_a_worker_killed_from_outside_costs_one_item():
    with Scorer([RewardFunction("format", parameters=HANG)], workers=1, timeout=60.0) as scorer:
        scorer.score([group(["a"])])
        (pid,) = scorer._pool.pids
        signal_when_hanging(pid, signal.SIGKILL)
        scored = scorer.score([group(["aa", HANGING_TEXT, "aaa", "b"])])
        assert verdicts(scored) == ["ok", "error", "ok", "ok"]
        assert rewards(scored) == [1, 0, 1, 0]
        (new,) = scorer._pool.pids
        os.kill(new, signal.SIGKILL)  # between batches no item is lost
        os.waitid(os.P_PID, new, os.WEXITED | os.WNOWAIT)
        assert verdicts(scorer.score([group(["aaaa"])])) == ["ok"]


def test_scores_off_the_main_thread_and_from_several_threads(math_scorer):
    found: dict[int, list[float]] = {}

    def work(index):
        texts = [rf"\boxed{{x+{n}}}" for n in range(index, index + 8)]
        found[index] = rewards(math_scorer.score([group(texts, f"{index}+x")]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: [1.0] + [0.0] * 7, 100: [1.0] + [0.0] * 7}


def test_workers_end_with_the_scorer_and_with_their_parent():
    scorer = Scorer([RewardFunction("format")], workers=1)
    scorer.score([group(["x"])])
    (pid,) = scorer._pool.pids
    scorer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    script = (
        "import os, signal\n"
        "from gft_lite.rewards.scorer import RewardFunction, Scorer\n"
        "from gft_lite.types import Group, Problem, Response\n"
        "scorer = Scorer([RewardFunction('format')], workers=1)\n"
        "scorer.score([Group(Problem('p', 'q', '5'), (Response((1,), 'x', 'self'),))])\n"
        "print(scorer._pool.pids[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # no __main__ guard: the workers must not run the user's script again
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert output.stdout.count("\n") == 1, output.stderr
    orphan = int(output.stdout)
    wait_until(lambda: not _running(orphan))


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_rule_that_cannot_start_in_the_worker_is_reported():
    from gft_lite.rewards.worker_pool import WorkerPool

    pool = WorkerPool([("format", {"pattern": "("})], workers=1, timeout=1.0)
    with pytest.raises(RewardError, match="must start"):
        pool.run([b'[0, "x", null, null]'])
    assert pool.pids == []


USER = """
import asyncio
import json
import os
import sys
import time

def length(completions, **columns):
    return [float(len(c)) for c in completions]

def sparse(completions, answer, level, **columns):
    return [None if l == "hard" else float(c == a) for c, a, l in zip(completions, answer, level)]

def named(completions, bonus):
    return [bonus] * len(completions)

def record(**arguments):
    with open(arguments.pop("path"), "w") as file:
        json.dump(arguments, file)
    return [0.0] * len(arguments["completions"])

def raises(completions, **columns): raise KeyError("gone")
def short(completions, **columns): return [1.0]
def text(completions, **columns): return "11"
def nan(completions, **columns): return [float("nan")] * len(completions)
def string(completions, **columns): return ["1"] * len(completions)
def number_bytes(completions, **columns): return [b"1"] * len(completions)
def complex_number(completions, **columns): return [1j] * len(completions)
def nested(completions, **columns): return [[1.0]] * len(completions)
def huge(completions, **columns): return [1e308] * len(completions)
def huge_integer(completions, **columns): return [10 ** 5000] * len(completions)
def mapping(completions, **columns): return {c: 1.0 for c in completions}
def nothing(completions, **columns): pass
def scalar(completions, **columns):
    import torch
    return torch.tensor(1.0)
def exits(completions, **columns): sys.exit(0)
def exits_silently(completions, **columns): raise SystemExit
def interrupts(completions, **columns): raise KeyboardInterrupt
def deeper(): deeper()  # Not itself: CPython 3.13.0 counts no calls of functions with **.
def recurses(completions, **columns): deeper()
def cancels(completions, **columns): raise asyncio.CancelledError("gone")
class Unprintable(Exception):
    def __str__(self): raise ValueError
def unprintable(completions, **columns): raise Unprintable
def lines(completions, **columns): raise ValueError("one" + chr(10) + "two")
def late(completions, **columns):
    yield 1.0
    sys.exit(0)
def endless(completions, **columns):
    while True: yield 1.0
async def late_exit(completions, **columns): sys.exit(0)
class Exiting:
    def __float__(self): sys.exit(0)
    def __repr__(self): sys.exit(0)
def exiting_entries(completions, **columns): return [Exiting() for _ in completions]

def generator(completions, **columns):
    for c in completions: yield None if c == "b" else 0.5
async def coroutine(completions, **columns):
    await asyncio.sleep(0)
    return [0.5, None]
def numpy_array(completions, **columns):
    import numpy
    return numpy.array([0.5, 2], dtype=numpy.float32)
def numpy_scalars(completions, **columns):
    import numpy
    return [numpy.bool_(True), numpy.int64(3)]
def tensor(completions, **columns):
    import torch
    return torch.tensor([0.5, 2.0])
def booleans(completions, **columns): return (True, False)
def fractions(completions, **columns):
    from decimal import Decimal
    from fractions import Fraction
    return [Fraction(1, 4), Decimal("0.5")]
value = 3

def note(path, text):
    with open(path, "a") as file:
        file.write(text)
def waits(completions, path):
    with open("pid", "w") as file:
        file.write(str(os.getpid()))
    os.replace("pid", path)
    time.sleep(60)
def one_raises(completions, **columns):
    if "bad" in completions: raise ValueError("bad")
    return [1.0] * len(completions)
def one_exits(completions, **columns):
    if "bad" in completions: os._exit(0)
    return [1.0] * len(completions)
def one_is_killed(completions, **columns):
    if "bad" in completions: os.kill(os.getpid(), 9)
    return [1.0] * len(completions)
def one_is_nan(completions, **columns):
    return [float("nan") if c == "bad" else 1.0 for c in completions]
def one_hangs(completions, **columns):
    if "bad" in completions: time.sleep(60)
    return [1.0] * len(completions)
async def coroutine_raises(completions, **columns):
    return one_raises(completions)
async def coroutine_exits(completions, **columns):
    return one_exits(completions)
async def coroutine_hangs(completions, **columns):
    if "bad" in completions: await asyncio.sleep(60)
    return [1.0] * len(completions)
running, loops = 0, set()
async def concurrent(completions, **columns):
    global running
    running += 1
    loops.add(asyncio.get_running_loop())
    note("running", f"{running} ")
    await asyncio.sleep(0.05)
    running -= 1
    assert len(loops) == 1
    return [len(completions)] * len(completions)
def leaves(completions, **columns):
    note("left", ".")
    os._exit(0)
def show(completions, path, prompts, completion_ids, answer, **columns):
    note(path, repr([{name: value[0] for name, value in columns.items()}]))
    return [0.0] * len(completions)
"""


def call(name):
    """What a function gives for two responses, called in this process."""
    arguments = {"completions": ["a", "b"], "answer": ["5", "5"]}
    function = UserFunction(RewardFunction(name))
    if function.is_async:
        return function.call_concurrently([(arguments, 2, 60.0)], 1)[0]
    return function.call(arguments, 2)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(USER)
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    (tmp_path / "exiting_rewards.py").write_text("import sys; sys.exit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return tmp_path


def test_weighted_sum_with_a_part_that_does_not_apply(user_module):
    functions = [
        RewardFunction("exact", 1.0, {"marker": "#"}),
        RewardFunction("my_rewards:length", 0.25),
        RewardFunction("my_rewards.sparse", -2.0),
    ]
    with Scorer(functions) as scorer:
        easy = group(["#5", "x"], level="easy")
        hard = group(["#5"], level="hard")
        scored = scorer.score([easy, hard])
    assert rewards(scored) == [1 + 0.5 + 0, 0.25, 1.5]
    assert scored[0].responses[0].reward_parts == {
        "exact": 1.0, "my_rewards:length": 2.0, "my_rewards.sparse": 0.0,
    }  # fmt: skip
    assert scored[1].responses[0].reward_parts == {"exact": 1.0, "my_rewards:length": 2.0}
    assert verdicts(scored) == ["ok", "no_answer", "ok"]


def test_a_response_that_no_function_applies_to_has_no_reward(user_module):
    with Scorer([RewardFunction("my_rewards:generator")]) as scorer:
        (scored,) = scorer.score([group(["a", "b"])])
    assert [r.reward for r in scored] == [0.5, None]
    assert [r.reward_parts for r in scored] == [{"my_rewards:generator": 0.5}, {}]
    assert verdicts([scored]) == ["ok", "not_applicable"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("generator", [0.5, None]),
        ("coroutine", [0.5, None]),
        ("numpy_array", [0.5, 2.0]),
        ("numpy_scalars", [1.0, 3.0]),
        ("tensor", [0.5, 2.0]),
        ("booleans", [1.0, 0.0]),
        ("fractions", [0.25, 0.5]),
    ],
)
def test_scores_of_other_types_become_floats(user_module, name, expected):
    found = call(f"my_rewards:{name}")
    assert found == expected
    assert all(type(reward) is float for reward in found if reward is not None)


def test_a_coroutine_is_awaited_where_an_event_loop_runs(user_module):
    async def notebook_cell():
        with Scorer([RewardFunction("my_rewards:coroutine")]) as scorer:
            return scorer.score([group(["a", "b"])])

    (scored,) = asyncio.run(notebook_cell())
    assert [response.reward for response in scored] == [0.5, None]


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        ([RewardFunction("my_rewards:length")], [None, None]),
        ([RewardFunction("format")], [None, None]),
        ([RewardFunction("format"), RewardFunction("exact", 1.0, {"marker": "#"})], [True, False]),
        ([RewardFunction("my_rewards:length", correct_above=2.0)], [False, True]),
        ([RewardFunction("my_rewards:generator", correct_above=0.4)], [True, True]),
        (
            [RewardFunction("my_rewards:length"), RewardFunction("exact", 0.0, {"marker": "#"}),
             RewardFunction("my_rewards:booleans", correct_above=0.5)],
            [True, False],
        ),
    ],
)  # fmt: skip
def test_correctness_is_decided_by_the_first_function_with_a_threshold(
    user_module, functions, expected
):
    with Scorer(functions) as scorer:
        (scored,) = scorer.score([group(["#5", "abc"])])
    assert [response.correct for response in scored] == expected


def test_a_response_that_the_deciding_function_does_not_apply_to_is_not_correct(user_module):
    with Scorer([RewardFunction("my_rewards:generator", correct_above=0.4)]) as scorer:
        (scored,) = scorer.score([group(["a", "b"])])
    assert [response.correct for response in scored] == [True, False]


def test_parameters_reach_a_function_without_keyword_arguments(user_module):
    with Scorer([RewardFunction("my_rewards:named", 1.0, {"bonus": 0.5})]) as scorer:
        assert rewards(scorer.score([group(["a", "b"], level=1)])) == [0.5, 0.5]


@pytest.mark.parametrize("conversational", [False, True])
def test_user_functions_get_the_arguments_of_trl(user_module, conversational):
    path = str(user_module / "arguments.json")
    function = RewardFunction("my_rewards:record", 1.0, {"path": path})
    with Scorer([function], conversational=conversational) as scorer:
        scorer.score([group(["a", "b"], "5", level="easy"), group(["c"], "6", topic="algebra")])
    with open(path) as file:
        got = json.load(file)
    prompt, completions = "What is it?", ["a", "b", "c"]
    if conversational:
        prompt = [{"role": "user", "content": prompt}]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    assert got == {
        "prompts": [prompt] * 3,
        "completions": completions,
        "completion_ids": [[7, 0], [7, 1], [7, 0]],
        "answer": ["5", "5", "6"],
        "level": ["easy", "easy", None],
        "topic": [None, None, "algebra"],
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards:raises", "must not raise, got KeyError: 'gone'"),
        ("my_rewards:short", r"one entry per completion \(2\), got 1"),
        ("my_rewards:text", "list of numbers or None, got str"),
        ("my_rewards:nan", "finite numbers or None, got nan"),
        ("my_rewards:string", "finite numbers or None, got '1'"),
        ("my_rewards:number_bytes", "finite numbers or None, got b'1'"),
        ("my_rewards:complex_number", "finite numbers or None, got 1j"),
        ("my_rewards:nested", r"finite numbers or None, got \[1.0\]"),
        ("my_rewards:huge", r"at most 1e\+15 in magnitude, got 1e\+308"),
        ("my_rewards:huge_integer", "finite numbers or None, got a int"),
        ("my_rewards:mapping", "list of numbers or None, got dict"),
        ("my_rewards:nothing", "list of numbers or None, got NoneType"),
        ("my_rewards:scalar", "must not raise, got TypeError: iteration over a 0-d tensor"),
        ("my_rewards:exits", "must not raise, got SystemExit: 0. Fix the function."),
        ("my_rewards:exits_silently", "must not raise, got SystemExit. "),
        ("my_rewards:interrupts", "must not raise, got KeyboardInterrupt. "),
        ("my_rewards:recurses", "must not raise, got RecursionError"),
        ("my_rewards:cancels", "must not raise, got CancelledError: gone"),
        ("my_rewards:unprintable", "must not raise, got Unprintable. "),
        ("my_rewards:lines", "must not raise, got ValueError: one two. "),
        ("my_rewards:late", "must not raise, got SystemExit: 0. "),
        ("my_rewards:endless", r"one entry per completion \(2\), got more"),
        ("my_rewards:late_exit", "must not raise, got SystemExit: 0. "),
        ("my_rewards:exiting_entries", "finite numbers or None, got a Exiting"),
        ("my_rewards:sparse", "got TypeError"),  # the data set has no column `level`
    ],
)
def test_a_misbehaving_user_function_is_named(user_module, name, message):
    try:
        text = call(name)[0][0]
    except RewardError as error:  # of what is no list of entries
        text = str(error)
    assert text.startswith(f"reward '{name}': ")
    assert re.search(message, text)


def test_an_interrupt_by_the_user_is_not_an_error_of_the_function(user_module):
    """Ctrl-C reaches this process only, and ends the call of the other."""
    before = signal.getsignal(signal.SIGINT)
    function = RewardFunction("my_rewards:waits", parameters={"path": "called"})

    def press_ctrl_c():
        while not os.path.exists("called"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with Scorer([function]) as scorer, pytest.raises(KeyboardInterrupt):
        threading.Thread(target=press_ctrl_c).start()
        scorer.score([group(["a"])])
    assert signal.getsignal(signal.SIGINT) is before
    with open("called") as file, pytest.raises(ProcessLookupError):
        os.kill(int(file.read()), 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("one_raises", "must not raise, got ValueError: bad"),
        ("one_exits", "must not end the process that it runs in, got exit code 0"),
        ("one_is_killed", "got signal 9"),
        ("one_is_nan", "finite numbers or None, got nan"),
        ("coroutine_raises", "must not raise, got ValueError: bad"),
        ("coroutine_exits", "got exit code 0"),
    ],
)
def test_a_failure_costs_one_response(user_module, name, reason):
    groups = [group(["a", "bad", "b"]), group(["c", "d"])]
    functions = [RewardFunction(f"my_rewards:{name}"), RewardFunction("exact")]
    lines = []
    with Scorer(functions, log=lines.append) as scorer:
        first, second = scorer.score(groups)
        assert [r.reward for r in first] == [1.0, None, 1.0]
        assert [r.reward for r in second] == [1.0, 1.0]
        assert [r.verdict for r in first] == ["no_answer", "error", "no_answer"]
        # What the other function gave is shown.
        assert first.responses[1].reward_parts == {"exact": 0.0}
        [line] = lines
        assert reason in line and line.startswith(f"reward 'my_rewards:{name}': ")
        assert line.endswith(" 1 of 5 responses have no reward.")
        # A few failures after a success are no reason to stop; failures of several problems are.
        assert rewards(scorer.score([group(["bad"])])) == [None]
        with pytest.raises(RewardError, match=reason.replace("(", ".")):
            scorer.score([group(["bad"]) for _ in range(3)])


def test_a_call_that_hangs_costs_one_response(user_module, monkeypatch):
    monkeypatch.setattr(user_calls, "_FIRST_CALL_SECONDS", 0.0)
    lines = []

    def score(name):
        functions = [RewardFunction(f"my_rewards:{name}")]
        with Scorer(functions, timeout=0.35, log=lines.append) as scorer:
            return scorer.score([group(["a", "bad"])])

    with ThreadPoolExecutor() as pool:  # Both wait for the limits at the same time.
        for scored in pool.map(score, ("one_hangs", "coroutine_hangs")):
            assert rewards(scored) == [1.0, None]
            assert verdicts(scored) == ["ok", "timeout"]
    assert len(lines) == 2
    assert all("must return within 1.4 s for 1 responses, got nothing" in line for line in lines)


def test_calls_of_a_coroutine_function_are_awaited_a_few_at_a_time(user_module):
    """One for each group, on one event loop, with at most `concurrency` in flight."""
    groups = [group(["a", "b"]), group(["c"]), group(["d", "e", "f"]), group(["g"])]
    with Scorer([RewardFunction("my_rewards:concurrent")], concurrency=3) as scorer:
        scored = scorer.score(groups)
        assert [[r.reward for r in g] for g in scored] == [[2, 2], [1], [3, 3, 3], [1]]
        assert scorer.score(groups[:1])[0].rewards == (2, 2)
    with open("running") as file:
        assert max(map(int, file.read().split())) == 3


def test_a_function_that_ends_its_process_at_once_is_a_user_error(user_module):
    with Scorer([RewardFunction("my_rewards:leaves")]) as scorer:
        with pytest.raises(RewardError, match=r"must not end .* got exit code 0\. Fix"):
            scorer.score([group(["a"] * 20)])
        with open("left") as file:  # once for all, then for each of the first ones alone
            assert len(file.read()) == 1 + 8


def test_columns_have_the_types_of_the_data(user_module):
    columns = {
        "day": datetime.date(2026, 1, 2),
        "image": b"\x00\xff",
        "nested": {"a": [1, None, 0.5, "\ud800"]},
        "price": Decimal("0.10"),
        "took": datetime.timedelta(seconds=1.5),
        "when": datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    }
    with Scorer([RewardFunction("my_rewards:show", parameters={"path": "shown"})]) as scorer:
        scorer.score([group(["a"], **columns)])
        with open("shown") as file:
            assert file.read() == repr([columns])
        with pytest.raises(RewardError, match="lists or objects of them, got a complex"):
            scorer.score([group(["a"], number=1j)])


def test_a_weighted_sum_that_overflows_is_an_error(user_module):
    function = RewardFunction("my_rewards:length", 1e300)
    with Scorer([function]) as scorer, pytest.raises(RewardError, match=r"weighted sum .* 1e\+300"):
        scorer.score([group(["a"])])


@pytest.mark.parametrize(
    ("parameter", "message"),
    [("bonsu", "got 'bonsu'. Did you mean 'bonus'"), ("completions", "Rename it")],
)
def test_parameters_that_the_function_does_not_accept(user_module, parameter, message):
    with pytest.raises(RewardError, match=message):
        Scorer([RewardFunction("my_rewards:named", 1.0, {parameter: 1})])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("exiting_rewards:f", "must not fail, got SystemExit: 0"),
        ("my_rewards:absent", "no such name"),
        ("my_rewards:value", "got a int"),
        ("no_such_module_here:f", "importable"),
        ("broken_rewards:f", "ZeroDivisionError"),
        ("plain", "or a dotted path, got 'plain'"),
        (":f", "or a dotted path"),
    ],
)
def test_wrong_dotted_paths(user_module, path, message):
    with pytest.raises(RewardError, match=message):
        load_function(path)


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ([], {}, "at least one"),
        (["math", "math"], {}, "'math' twice"),
        (["math"], {"workers": 0}, "at least 1, got 0"),
        (["math"], {"timeout": 0.0}, "positive seconds, got 0.0"),
        (["mth"], {}, "Did you mean 'math'"),
    ],
)
def test_wrong_settings(functions, options, message):
    with pytest.raises(RewardError, match=message):
        Scorer([RewardFunction(name) for name in functions], **options)


@pytest.mark.parametrize("name", [name for name in REWARDS if name != JUDGE])
def test_every_rule_of_the_table_can_be_made_and_graded(name):
    grade = make_rule(RewardFunction(name))(r"\boxed{5}", "5", None)
    assert grade.score == float(name != "exact")  # there is no marker in the text
    assert REWARDS[name].doc


def test_importing_the_table_is_light():
    code = (
        "import sys, gft_lite.rewards, gft_lite.rewards.scorer, gft_lite.rewards.worker_process\n"
        "from gft_lite.rewards import RewardFunction, make_rule\n"
        "judge = {'url': 'http://localhost:1/v1', 'model': 'm', 'rubric': 'Short.'}\n"
        "for name in gft_lite.rewards.registry.REWARDS:\n"
        "    make_rule(RewardFunction(name, parameters=judge if name == 'judge' else {}))\n"
        "heavy = ['torch', 'sympy', 'math_verify', 'numpy', 'pydantic', 'transformers']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "[]", output.stderr
