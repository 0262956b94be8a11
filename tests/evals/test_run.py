"""A benchmark's run: what is drawn, graded, kept and drawn again, with samples that a test makes up."""

import dataclasses
import json
import resource
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.drawing import Drawn, Wanted
from deepseek_jax.evals.graders import Graders
from deepseek_jax.evals.measures import clustered
from deepseek_jax.evals.run import Benchmark, run
from deepseek_jax.evals.samples import Key, Samples
from deepseek_jax.evals.server import ServerDrawer
from deepseek_jax.evals.summary import summary
from deepseek_jax.evals.task import Grade
from deepseek_jax.evals.tasks import TASKS
from deepseek_jax.report.progress import Progress
from deepseek_jax.rewards.sandbox import processors

SETTINGS = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 64}


class MadeUp:
    """Draws what a function of the seed says, in an order of its own; stops after so many, as a killed run does."""

    def __init__(self, most=None, turned=False):
        self.most, self.turned, self.asked = most, turned, []

    def check(self, wanted):
        pass

    def __call__(self, wanted):
        numbers = list(range(len(wanted)))
        for count, number in enumerate(reversed(numbers) if self.turned else numbers):
            if count == self.most:
                raise KeyboardInterrupt
            self.asked.append(wanted[number].seed)
            seed = wanted[number].seed
            answer = seed % 3
            text = f"<think>thinking</think>It is \\boxed{{{answer}}}." if seed % 5 else "<think>never done"
            yield number, Drawn("", text, 10 + seed % 7, 6, bool(seed % 5))


@pytest.fixture
def benchmark(tmp_path):
    """Twelve questions, three samples each."""
    rows = [{"question": f"{number} mod 3?", "answer": str(number % 3)} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = TASKS["gsm8k"].problems(open_source(str(tmp_path / "rows.jsonl")))
    return Benchmark(TASKS["gsm8k"], problems, "deepseek", 3, 0)


def ran(benchmark, drawer, folder):
    """The samples of a run in a folder."""
    folder.mkdir(exist_ok=True)
    held = Samples(folder)
    with (
        Graders() as graders,
        Progress(12 * benchmark.samples, "test", start=len(held), console=Console(quiet=True)) as progress,
    ):
        run(benchmark, drawer, graders, held, progress)
    held.put_in_order(["gsm8k"])
    return held


def without_times(folder):
    lines = (folder / "samples.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def test_a_run_stopped_at_any_of_ten_moments_leaves_the_same_file(benchmark, tmp_path):
    """In another order too, and with a line torn at its end; what is there is not drawn again."""
    whole = MadeUp()
    ran(benchmark, whole, tmp_path / "whole")
    wanted = without_times(tmp_path / "whole")
    assert len(wanted) == 36 and [line["number"] for line in wanted] == sorted(line["number"] for line in wanted)
    assert len(set(whole.asked)) == 36
    folder = tmp_path / "stopped"
    for moment in range(10):
        held = folder / "samples.jsonl"
        before = len(Samples(folder)) if held.exists() else 0
        drawer = MadeUp(most=3, turned=moment % 2 == 1)
        with pytest.raises(KeyboardInterrupt):
            ran(benchmark, drawer, folder)
        assert len(Samples(folder)) <= before + 3
        with held.open("ab") as file:
            file.write(b'{"benchmark": "gsm8k", "number": 1')
    last = MadeUp()
    found = ran(benchmark, last, folder)
    assert without_times(folder) == wanted and len(found) == 36 and len(last.asked) <= 36 - 10


def test_the_summary_is_what_the_samples_say(benchmark, tmp_path):
    held = ran(benchmark, MadeUp(), tmp_path / "out")
    lines = without_times(tmp_path / "out")
    with Graders() as graders:
        values = summary(benchmark, held, graders, SETTINGS)
    scores = [[line["score"] for line in lines if line["number"] == number] for number in range(12)]
    found = clustered(scores)
    assert (values["pass@1"], values["stderr"], values["n"]) == (found.mean, found.stderr, 12)
    assert values["samples"] == 3 and values["ungraded"] == 0 and values["problems"] == 12
    unclosed = sum(line["seed"] % 5 == 0 for line in lines) / 36
    assert values["truncated"] == pytest.approx(unclosed) and values["unclosed"] == pytest.approx(unclosed)
    assert values["mean_tokens"] == pytest.approx(sum(line["tokens"] for line in lines) / 36)
    assert values["mean_thinking_tokens"] == 6 and values["languages"]["en"] > 0.5
    assert {"pass@2", "pass@3", "cons@3", "interval", "lenient", "tokens_per_second", "wall_seconds"} <= values.keys()
    assert values["unlike_published"] == {"samples": [3, 1], "max_tokens": [64, 32_768]}
    assert values["peak_memory_bytes"] > 1e7


def test_what_no_grader_could_judge_is_counted_apart(benchmark, tmp_path):
    """Neither right nor wrong, and said with its reason."""
    grade = lambda rows, graders: [Grade(None, reason="no") if r.problem.answer == "0" else Grade(1.0) for r in rows]
    broken = benchmark._replace(task=dataclasses.replace(benchmark.task, grade=grade))
    held = ran(broken, MadeUp(), tmp_path / "out")
    with Graders() as graders:
        values = summary(broken, held, graders, SETTINGS)
    assert values["pass@1"] == 1.0 and values["n"] == 8 and values["ungraded"] == 12
    assert values["ungraded_reasons"] == {"no": 12}


def test_a_grader_that_raises_ends_the_run(benchmark, tmp_path):
    def grade(rows, graders):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        ran(benchmark._replace(task=dataclasses.replace(benchmark.task, grade=grade)), MadeUp(), tmp_path / "out")


def test_programs_are_graded_on_all_cores_at_once(benchmark, tmp_path):
    """As many calls as there are processors meet at a barrier, while samples are still drawn."""
    barrier = threading.Barrier(processors())

    def grade(rows, graders):
        assert len(rows) == 1
        barrier.wait(60)
        return [Grade(1.0)]

    task = dataclasses.replace(benchmark.task, grade=grade, batch=1)
    held = ran(benchmark._replace(task=task, samples=processors()), MadeUp(), tmp_path / "out")
    assert len(held) == 12 * processors()


def test_a_sample_is_a_function_of_seed_benchmark_problem_and_number(benchmark):
    wanted = benchmark.wanted(Key("gsm8k", 4, 2))
    assert benchmark._replace(samples=9).wanted(Key("gsm8k", 4, 2)) == wanted
    assert benchmark._replace(problems=benchmark.problems[:5]).wanted(Key("gsm8k", 4, 2)) == wanted
    others = [benchmark._replace(seed=1).wanted(Key("gsm8k", 4, 2)), benchmark.wanted(Key("gsm8k", 4, 1))]
    assert wanted.seed not in {other.seed for other in others}


def test_a_full_disk_leaves_whole_lines(benchmark, tmp_path):
    """So that what is added when there is room again begins a line of its own."""
    ran(benchmark, MadeUp(), tmp_path / "whole")
    lines = list(map(json.loads, (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()))
    held = Samples(tmp_path)
    held.append(lines[:2])
    before, limit = (tmp_path / "samples.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
    try:
        with pytest.raises(OSError, match="samples.jsonl"):
            held.append(lines[2:4])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "samples.jsonl").read_bytes() == before and len(held) == 2
    held.append(lines[4:])
    assert len(Samples(tmp_path)) == len(held) == 34


def test_a_file_that_holds_no_samples_is_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"benchmark": "gsm8k", "number": 0, "sample": 0}\n[1]\n')
    with pytest.raises(ValueError, match=r"samples.jsonl:2: not a sample"):
        Samples(tmp_path)


# --- a server -------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers by the seed; is busy at the first request."""

    def log_message(self, *of):
        pass

    def do_GET(self):
        self._send(200, {"data": [{"id": "toy"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked | {"path": self.path, "key": self.headers["Authorization"]})
        if len(self.server.asked) == 1:
            return self._send(503, {"error": "busy"})
        if asked["messages"][-1]["content"] == "refuse":
            return self._send(400, {"error": "no such model"})
        message = {"content": f"\\boxed{{{asked['seed'] % 3}}}", "reasoning_content": "hm"}
        usage = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 4}}
        return self._send(200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    def _send(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.asked = []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def test_samples_come_from_a_server(server, benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("TOY_KEY", "secret")
    url = f"http://127.0.0.1:{server.server_port}"
    drawer = ServerDrawer(url, None, {"temperature": 0.6}, batch=4, system="Be brief.", key_variable="TOY_KEY")
    held = ran(benchmark, drawer, tmp_path / "out")
    asked = server.asked[-1]
    assert drawer.model == "toy" and len(held) == 36 and len(server.asked) == 37
    assert asked["model"] == "toy" and asked["temperature"] == 0.6 and asked["path"] == "/v1/chat/completions"
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."} and asked["key"] == "Bearer secret"
    record = held.get(Key("gsm8k", 0, 0))
    assert record["completion"] == f"<think>hm</think>\\boxed{{{record['seed'] % 3}}}"
    assert (record["tokens"], record["thinking_tokens"], record["truncated"]) == (9, 4, False)
    assert record["score"] == float(record["seed"] % 3 == 0)


def test_a_server_that_refuses_ends_the_run_in_one_line(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    drawer = ServerDrawer(url, "toy", {}, batch=1)
    with pytest.raises(ValueError, match="status 400: .*no such model.*goes on from the samples") as told:
        list(drawer([Wanted("refuse", 0)]))
    assert "\n" not in str(told.value)
    for content in ([{"type": "text", "text": "4"}], 4):
        odd = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
        monkeypatch.setattr(drawer, "_asked", lambda path, body, odd=odd: odd)
        with pytest.raises(ValueError, match="got an answer that is none .*a content that is no text"):
            list(drawer([Wanted("ask", 0)]))
    with pytest.raises(ValueError, match="server: got 'localhost:1', wanted an address such as http"):
        ServerDrawer("localhost:1", "toy", {}, batch=1)
    with pytest.raises(ValueError, match="server_key: got 'NO_SUCH_VARIABLE'"):
        ServerDrawer(url, "toy", {}, batch=1, key_variable="NO_SUCH_VARIABLE")
    with pytest.raises(ValueError, match="thinking_budgets: got some with --server"):
        drawer.check([Wanted("?", 0, budget=3)])
