"""G-Eval against a server with known token probabilities, one without, bad ones, and a local model."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ftdist.errors import Failed, UserError
from ftdist.evaluate import g_eval, tables

ROWS = [
    {
        "messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "r"}],
        "reference": f"r{i}",
    }
    for i in range(3)
]
ANSWERS = {"base": ["bad 0", "bad 1", "bad 2"], "tuned": ["good 0", "good 1", ""]}
SETTINGS = {"criteria": "Is it right?", "model": "judge-1", "steps": None, "scale": 5, "reference": True, "samples": 20,
            "concurrency": 2, "requests_per_minute": 6e6, "retries": 2, "timeout": 5.0, "price_in": 1.0,
            "price_out": 2.0}  # fmt: skip
GOOD = {"5": 0.6, "4": 0.3, " 5": 0.05, "x": 0.05}  # Σ p·s / Σ p = 4.6842
BAD = {"1": 0.5, "2": 0.25, "7": 0.25}  # 7 is no score of this scale: 1.3333


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """`serve(answer)`: the URL of a server; `answer(body, count)` is a status, or choices."""
    monkeypatch.setenv("FTDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(g_eval.time, "sleep", lambda seconds: None)
    servers = []

    def serve(answer):
        class Handler(BaseHTTPRequestHandler):
            count = 0
            bodies = []

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                Handler.count += 1
                Handler.bodies.append(body)
                status, content = answer(body, Handler.count)
                whole = {"choices": content, "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
                raw = content if isinstance(content, bytes) else json.dumps(whole).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", Handler

    yield serve
    for server in servers:
        server.shutdown()


def text(content, probabilities=None):
    choice = {"message": {"content": content}}
    if probabilities:
        top = [{"token": t, "logprob": math.log(p)} for t, p in probabilities.items()]
        best = max(top, key=lambda entry: entry["logprob"])
        space = {"token": " ", "logprob": 0.0}
        choice["logprobs"] = {"content": [space | {"top_logprobs": [space]}, best | {"top_logprobs": top}]}
    return choice


def asks_for_steps(body):
    return "Write the steps" in body["messages"][0]["content"]


def known(body, count):
    prompt = body["messages"][0]["content"]
    if asks_for_steps(body):
        return 200, [text("1. Read.\n2. Compare.")]
    assert "1. Read.\n2. Compare." in prompt and "Is it right?" in prompt
    return 200, [text(" 5", GOOD if "Answer to grade:\ngood" in prompt else BAD)]


def test_scores_are_weighted_by_the_token_probabilities(serve):
    url, handler = serve(known)
    found, ledger = g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS)
    assert found["tuned"]["g_eval"][:2] == pytest.approx([(0.65 * 5 + 0.3 * 4) / 0.95] * 2)
    assert found["base"]["g_eval"] == pytest.approx([1 / 0.75] * 3)
    assert ledger["scored"] == 6 and ledger["failed"] == 0
    assert (ledger["tokens_in"], ledger["tokens_out"], ledger["cost"]) == (700, 70, 840e-6)
    assert handler.bodies[-1]["logprobs"] is True and handler.bodies[-1]["top_logprobs"] == 20
    # again: nothing is asked twice
    again, ledger = g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS)
    assert again == found and handler.count == 7
    assert (ledger["requests"], ledger["remembered"], ledger["cost"]) == (0, 7, 0)
    assert "7 remembered" in tables.told(ledger)


def test_several_criteria_and_given_steps(serve):
    url, handler = serve(lambda body, count: (200, [text("3", {"3": 1.0})]))
    settings = SETTINGS | {"criteria": {"right": "a", "kind": "b"}, "steps": {"right": "look", "kind": "feel"}}
    found, _ = g_eval.judge(ROWS, ANSWERS, judge=url, **settings)
    assert set(found["base"]) == {"g_eval", "g_eval_right", "g_eval_kind"}
    assert found["base"]["g_eval"] == [3.0] * 3
    assert not any(asks_for_steps(body) for body in handler.bodies)


def test_without_probabilities_twenty_samples_are_drawn(serve):
    def sampled(body, count):
        if asks_for_steps(body):
            return 200, [text("steps")]
        if body.get("logprobs"):
            return 200, [text("4")]
        assert body["temperature"] == 1
        given = ["4"] * 5 + ["2/5"] * 2 + ["I cannot grade this"]
        return 200, [text(word) for word in given[: body["n"]]]  # at most eight a request

    url, handler = serve(sampled)
    found, ledger = g_eval.judge(ROWS[:1], {"tuned": ["x"]}, judge=url, **SETTINGS)
    # 8 + 8 + 4 answers: fives and twos as above, then four fours; what cannot be read is left out of the mean
    assert found["tuned"]["g_eval"] == pytest.approx([(14 * 4 + 4 * 2) / 18])
    assert ledger["by_sampling"] == 1
    assert [body["n"] for body in handler.bodies if "n" in body] == [20, 12, 4]


def test_nonsense_is_a_failure_and_no_zero(serve):
    def partly(body, count):
        if asks_for_steps(body):
            return 200, [text("steps")]
        good = "good" in body["messages"][0]["content"]
        return 200, [text(" 5", GOOD)] if good else [text("no idea", {"no": 0.9, "idea": 0.1})]

    url, _ = serve(partly)
    found, ledger = g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS)
    assert all(map(math.isnan, found["base"]["g_eval"]))
    assert not any(map(math.isnan, found["tuned"]["g_eval"][:2]))
    assert ledger["failed"] == 4 and "no idea" in tables.told(ledger)
    url, _ = serve(lambda body, count: (200, [text("hm", {"hm": 1.0})]))
    with pytest.raises(Failed, match="no answer of .* holds a score"):
        g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS)


def test_what_may_pass_is_tried_again_and_what_may_not_is_said(serve):
    def shaky(body, count):
        return (429, b"slow down") if count % 3 == 1 else (500, b"") if count % 3 == 2 else known(body, count)

    url, _ = serve(shaky)
    _, ledger = g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS | {"concurrency": 1})
    assert ledger["scored"] == 6 and ledger["retried"] == 14
    url, _ = serve(lambda body, count: (401, b"bad key"))
    with pytest.raises(Failed, match="refuses .status 401: bad key"):
        g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS)
    url, _ = serve(lambda body, count: (200, b"<html>not an API</html>"))
    with pytest.raises(Failed, match="no chat completion"):
        g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS)
    with pytest.raises(Failed, match=r"does not answer .*what was judged is remembered"):
        g_eval.judge(ROWS, ANSWERS, judge="http://127.0.0.1:9/v1", **SETTINGS)


def test_answers_that_are_alike_are_judged_once(serve):
    url, handler = serve(known)
    same = {"base": ["good"] * 3, "tuned": ["good"] * 3}
    found, ledger = g_eval.judge(ROWS, same, judge=url, **SETTINGS | {"concurrency": 8})
    assert found["base"] == found["tuned"] and ledger["scored"] == 3
    assert handler.count == 4  # the steps, and a form for each row


def test_an_endpoint_that_refuses_or_garbles_probabilities(serve):
    def refuses(body, count):
        if asks_for_steps(body):
            return 200, [text("steps")]
        return (400, b"x" * 300 + b" logprobs are not supported") if "logprobs" in body else (200, [text("3")])

    url, _ = serve(refuses)
    found, ledger = g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS | {"retries": 0, "concurrency": 1})
    assert found["base"]["g_eval"] == [3.0] * 3 and ledger["failed"] == 0
    for garbled in ([1, 2], {"content": [{"token": "3"}]}, {"content": [{"token": "3", "logprob": None}]}, "none"):
        answer = [text("3") | {"logprobs": garbled}]
        url, _ = serve(lambda body, count, answer=answer: (200, [text("x")] if asks_for_steps(body) else answer))
        with pytest.raises(Failed, match="no answer of .* holds a score .*not those of the API"):
            g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS)


def test_nobody_asks_before_the_time_that_the_endpoint_names(serve, monkeypatch):
    slept = []
    monkeypatch.setattr(g_eval.time, "sleep", slept.append)
    url, handler = serve(lambda body, count: (429, b"") if count == 1 else known(body, count))
    handler.end_headers = lambda self: (self.send_header("Retry-After", "90"), BaseHTTPRequestHandler.end_headers(self))
    _, ledger = g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS | {"concurrency": 1})
    assert ledger["scored"] == 6 and ledger["retried"] == 1
    assert 80 < max(slept) <= 90
    url, handler = serve(lambda body, count: (429, b""))
    handler.end_headers = lambda self: (
        self.send_header("Retry-After", "9000"),
        BaseHTTPRequestHandler.end_headers(self),
    )
    with pytest.raises(Failed, match="does not answer .status 429, and asks to wait for 9000 s"):
        g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS)


def test_a_judge_that_goes_down_loses_nothing(serve):
    down = threading.Event()

    def mortal(body, count):
        if count == 4:
            down.set()
        return (503, b"") if down.is_set() else known(body, count)

    url, handler = serve(mortal)
    with pytest.raises(Failed, match="does not answer"):
        g_eval.judge(
            ROWS, ANSWERS, judge=url, **SETTINGS | {"concurrency": 1, "retries": 0, "criteria": "Is it right?"}
        )
    down.clear()
    handler.count = 10
    _, ledger = g_eval.judge(ROWS, ANSWERS, judge=url, **SETTINGS | {"concurrency": 1})
    assert ledger["remembered"] == 3 and ledger["scored"] == 6


def test_scores_in_words():
    assert [g_eval.stated(t, 5) for t in ("4", "Score: 4", " 4/5", "**3**", "Score: 4 of 5")] == [4, 4, 4, 3, 4]
    assert [g_eval.stated(t, 5) for t in ("", "great", "7", "0", "between 2 and 4", "3.5")] == [None] * 6
    assert g_eval.expected({"1": 0.5, "5": 0.5, "10": 9.0, "-1": 9.0}, 5) == 3.0
    assert g_eval.expected({"a": 1.0}, 5) is None


def test_a_local_model_judges_with_its_whole_distribution(model, tmp_path, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("FTDIST_CACHE", str(tmp_path / "cache"))
    settings = SETTINGS | {"model": None, "steps": "look"}
    found, ledger = g_eval.judge(ROWS, ANSWERS, judge=str(model), **settings)
    assert ledger["scored"] == 6
    tokenizer, judge = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    prompt = g_eval._form("Is it right?", "look", ROWS[0], "good 0", 5, True)
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").input_ids
    with torch.no_grad():
        p = judge(ids).logits[0, -1].double().softmax(-1)
    weights = [
        sum(float(p[i]) for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() == str(s)) for s in range(1, 6)
    ]
    expected = sum(s * w for s, w in enumerate(weights, 1)) / sum(weights)
    assert found["tuned"]["g_eval"][0] == pytest.approx(expected, rel=1e-4)
    again, ledger = g_eval.judge(ROWS, ANSWERS, judge=str(model), **settings)
    assert again == found and (ledger["requests"], ledger["remembered"]) == (0, 6)
    long = ANSWERS | {"tuned": ["word " * 3000, "good 1", ""]}
    found, ledger = g_eval.judge(ROWS, long, judge=str(model), **settings)
    assert math.isnan(found["tuned"]["g_eval"][0]) and ledger["failed"] == 1 and "takes 2048" in ledger["example"]
    with pytest.raises(UserError, match="no URL and no model directory"):
        g_eval.judge(ROWS, ANSWERS, judge="nobody", **settings)
