"""Model files and chat templates that somebody else has made, read as the server reads them, in a process of its own."""

from __future__ import annotations

import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import numpy as np
from gguf import GGUFWriter, TokenType

from atlas_jax.gguf import ChatTemplate, GGUFError, GGUFFile, TemplateError, Tokenizer
from benchmarks.attack.registry import Scene, attack

T = TypeVar("T")
_EACH_SECONDS = 5.0
_GROWTH_MIB = 512.0
_MESSAGES = [{"role": "user", "content": "hello " * 20}, {"role": "assistant", "content": "x"}]
_NUMBERS = (0, 1, 2, 7, 8, 9, 12, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
_WAYS = ("cut", "byte", "bytes", "number32", "number64", "insert", "remove", "copy", "zero", "swap")


def _base() -> bytes:
    """A small whole model file: metadata of every kind, a vocabulary, a template, tensors."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, "Ġ", "Ċ", "th", "the", "<|im_start|>", "<|im_end|>"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.gguf"
        writer = GGUFWriter(path, "llama")
        for name, value in (("block_count", 1), ("context_length", 256), ("embedding_length", 32)):
            writer.add_uint32(f"llama.{name}", value)
        for name, value in (("feed_forward_length", 64), ("attention.head_count", 2), ("attention.head_count_kv", 1)):
            writer.add_uint32(f"llama.{name}", value)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([int(TokenType.NORMAL)] * (len(tokens) - 2) + [int(TokenType.CONTROL)] * 2)
        writer.add_token_merges(["t h", "th e"])
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_chat_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        )
        writer.add_tensor("token_embd.weight", np.ones((len(tokens), 32), np.float32))
        writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _mutated(base: bytes, rng: random.Random) -> bytes:
    data = bytearray(base)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        way, at = rng.choice(_WAYS), rng.randrange(max(1, len(data)))
        if way == "cut":
            del data[at:]
        elif way == "byte":
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif way == "bytes":
            data[at : at + 16] = rng.randbytes(16)
        elif way in ("number32", "number64"):
            size = 4 if way == "number32" else 8
            data[at : at + size] = (rng.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
        elif way == "insert":
            data[at:at] = rng.randbytes(rng.choice((1, 8, 4096)))
        elif way == "remove":
            del data[at : at + rng.choice((1, 4, 8, 100))]
        elif way == "copy":
            data[at:at] = data[at : at + 64]
        elif way == "zero":
            data[at : at + 64] = bytes(64)
        else:
            other = rng.randrange(max(1, len(data)))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
        if not data:
            break
    return bytes(data)


def read_all(path: Path) -> None:
    """Reads a model file to the last tensor, its tokenizer and its template."""
    with GGUFFile.open(path) as file:
        for name in file.tensors:
            file.dequantize(name)
        tokenizer = Tokenizer.from_metadata(file.metadata)
        tokenizer.decode(tokenizer.encode("the cat sat", add_special=True, parse_special=True))
        template = ChatTemplate.from_metadata(file.metadata)
        if template is not None:
            template.render_tokens(tokenizer, _MESSAGES)


def _fuzz(seed: int, count: int) -> list[str]:
    base, rng, out = _base(), random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.gguf"
        for number in range(count):
            path.write_bytes(_mutated(base, rng))
            out += [f"file {seed}/{number}: {fault}" for fault in _watched(lambda: read_all(path))]
    return out


def _watched(work: Callable[[], None]) -> Iterator[str]:
    """What was wrong with one reading: another error than ours, too long, too much memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        work()
    except (GGUFError, TemplateError):
        pass
    except Exception as error:
        yield f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    took = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if took > _EACH_SECONDS:
        yield f"took {took:.1f} s"
    if grown > _GROWTH_MIB:
        yield f"took {grown:.0f} MiB"


def _apart(scene: Scene, work: Callable[..., list[str]], tasks: list[tuple[int, int]]) -> None:
    """Runs work in a process of its own, task by task, so that a hang or a crash is one fault and no more."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context)
    try:
        for task in tasks:
            scene.count(task[1])
            try:
                scene.faults += pool.submit(work, *task).result(timeout=60 + _EACH_SECONDS * task[1])
            except (TimeoutError, BrokenProcessPool) as error:
                scene.faults.append(f"task {task}: {type(error).__name__}")
                for process in list(pool._processes.values()):
                    process.kill()
                pool = ProcessPoolExecutor(1, mp_context=context)
    finally:
        pool.shutdown(cancel_futures=True)


@attack(
    "fuzzed model files",
    does="changes bytes of a model file and reads all of it",
    holds="it is read or refused with GGUFError, in 5 s and 512 MiB",
    alone=True,
)
def fuzzed_models(scene: Scene) -> None:
    _apart(scene, _fuzz, [(seed, 4) for seed in range(max(1, scene.times(412) // 4))])


_LOOP = "{% for a in range(99999) %}"
TEMPLATES = (
    "{% for a in range(10**9) %}{% endfor %}", _LOOP * 3 + "x" + "{% endfor %}" * 3, "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**10**8 }}", "{{ (10**5000) ** 5000 }}", "{{ 7 ** 7 ** 7 ** 7 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}",
    "{{ 1 / 0 }}",
    "{{ '%999999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}", "{{ '%*d' % (999999999, 1) }}",
    "{{ '{0:{1}}'.format(1, 999999999) }}",
    "{{ 'a'.ljust(10**9) }}", "{{ 'a'.center(10**9) }}", "{{ 'a'.zfill(10**9) }}", "{{ 'a' | center(10**9) }}",
    "{{ 'a' | indent(10**9) }}",
    "{{ 'a\\n' * 10000 | indent(100000) }}", "{{ ('a' * 50000).replace('a', 'b' * 50000) }}",
    "{{ ('a' * 50000) | replace('a', 'b' * 50000) }}",
    "{{ ('a' * 99999).join(['b'] * 99999) }}", "{{ (['ab' * 9999] * 9999) | join }}", "{{ range(10**9) | list }}",
    "{{ range(10**9) | sum }}",
    "{{ range(10**12) | length }}", "{{ range(10**9) | batch(1) | list }}", "{{ 'a' | wordwrap(0) }}",
    "{{ messages | tojson(indent=10**8) }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{% macro f(x) %}{{ f(x + x) }}{% endmacro %}{{ f('ab') }}",
    "{% set ns = namespace(a='aa') %}" + "{% set ns.a = ns.a ~ ns.a %}" * 60 + "{{ ns.a }}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "{% set a = [] %}{% set _ = a.append(a) %}{{ a }}",
    "{% set a = {} %}{% set _ = a.update({'a': a}) %}{{ a | tojson }}",
    "{% set a = [] %}{% for i in range(99999) %}{% set _ = a.append('a' * 9999) %}{% endfor %}{{ a | length }}",
    "{% for k in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ lipsum.__globals__ }}", "{{ lipsum(10**6) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "{{ '%(x)s' % {'x': ''.__class__} }}",
    "{{ messages | attr('__class__') }}",
    "{{ ''['__class__'] }}", "{{ joiner.__init__.__globals__ }}", "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}{{ x }}",
    "{% extends '/etc/passwd' %}", "{% set messages = 5 %}{% for m in messages %}{% endfor %}",
    "{{ raise_exception('x' * 10**7) }}",
    "{{ '" + "(" * 5000 + "' }}{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "not " * 20_000 + "1 }}",
    "{{ " + "1 + " * 50_000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{{ strftime_now('%' + 'Y' * 10**6) }}",
    "{{ ('a' * 30 ~ 'b') | regex_replace('(a+)+$', '') }}",
)  # fmt: skip


def _render(number: int, count: int) -> list[str]:
    tokenizer: list[Tokenizer] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.gguf"
        path.write_bytes(_base())
        with GGUFFile.open(path) as file:
            tokenizer.append(Tokenizer.from_metadata(file.metadata))

    def work() -> None:
        for source in TEMPLATES[number : number + count]:
            template = ChatTemplate(source)
            template.render(_MESSAGES)
            template.render_tokens(tokenizer[0], _MESSAGES)

    return [f"template {TEMPLATES[number][:50]!r}: {fault}" for fault in _watched(work)]


@attack(
    "hostile templates",
    does="renders chat templates that loop, grow, recurse or reach for Python",
    holds="each is rendered or refused with TemplateError, in 5 s and 512 MiB",
    alone=True,
)
def hostile_templates(scene: Scene) -> None:
    _apart(scene, _render, [(number, 1) for number in range(len(TEMPLATES))])
