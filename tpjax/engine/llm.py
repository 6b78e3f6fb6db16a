"""LLM: a model folder on a mesh, and what one asks of it."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from tpjax import env, native
from tpjax.buckets import Buckets
from tpjax.checkpoint import folder as folders
from tpjax.checkpoint import load
from tpjax.checkpoint.tokenizer import load_tokenizer
from tpjax.engine.chat import Conversation, chat_ids
from tpjax.engine.engine import Engine
from tpjax.engine.inputs import Prompt, as_params, as_prompts, check_ids, whole
from tpjax.engine.memory import check_memory
from tpjax.engine.request import Request, RequestOutput
from tpjax.errors import CheckpointError, UsageError
from tpjax.executables import Executables, OnBuild, fast_on_cpu, silent
from tpjax.padding import padding
from tpjax.parallel.mesh import check_axes, largest_degree, make_mesh
from tpjax.params import SamplingParams, refuse_unknown
from tpjax.patterns import normal
from tpjax.plan import Plan
from tpjax.weights import WeightTable

DEFAULT_MAX_MODEL_LEN = 4096
_KNOWN = (
    "model, tensor_parallel_size, data_parallel_size, expert_parallel_size, dtype, max_model_len,"
    " max_num_seqs, seed, plan, mesh, patterns, allow, verify, expect, expect_tokens"
).split(", ")
_RENAMED = {
    "tp": "tensor_parallel_size",
    "tp_size": "tensor_parallel_size",
    "tensor_parallel": "tensor_parallel_size",
    "ep_size": "expert_parallel_size",
    "enable_expert_parallel": "expert_parallel_size",
    "max_length": "max_model_len",
    "max_seq_len": "max_model_len",
    "max_batch_size": "max_num_seqs",
    "torch_dtype": "dtype",
    "trust_remote_code": "code from a checkpoint is never run here; leave it out",
    "gpu_memory_utilization": "memory is computed before it is used; leave it out",
}


class LLM:
    """Load a model onto a mesh and generate with it. Argument names are vLLM's.

    ``model``: a Hugging Face folder, a hub id or a tpjax checkpoint. ``tensor_parallel_size`` (1,
    or "auto" for the most devices the model allows without padding), ``data_parallel_size`` and
    ``expert_parallel_size`` (whole experts on different devices, times the former) make a mesh;
    ``mesh`` or ``plan`` give full control instead; ``patterns`` and ``allow`` say what is split on
    it, as `Plan.from_patterns` takes them. ``dtype``: auto, float32, bfloat16 or float16.
    ``max_model_len``: prompt plus generated tokens, by default the model's own limit but at most
    4096. ``max_num_seqs``: sequences decoded together, rounded up to whole rows per replica.
    ``seed``: for requests without one. ``verify``: how a tpjax checkpoint is compared with its
    manifest, "fast" (default: sizes, small files, a sample) or "full" (every byte that is read).

    ``expect``: prompts that will be generated together, with at most ``expect_tokens`` tokens each;
    what they need is built while weights load, and the tokenizer too.

    For commands: ``progress`` wraps the weights while they load, ``on_build`` is told of every
    executable, ``say`` gets lines for the user, ``random_weights`` takes a lone config.json.

    Raises CheckpointError, UsageError or ResourceError before anything large is read; what is wrong
    with the tokenizer or with ``expect``, while the first weights are.
    """

    def __init__(
        self,
        model: str | Path,
        tensor_parallel_size: int | Literal["auto"] | None = None,
        *,
        data_parallel_size: int | None = None,
        expert_parallel_size: int | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        seed: int = 0,
        plan: Plan | None = None,
        mesh: Mesh | None = None,
        patterns: Mapping[str, Sequence[str | None] | str] | None = None,
        allow: Sequence[str] = (),
        verify: Literal["fast", "full"] | None = None,
        expect: Prompt | Sequence[Prompt] = (),
        expect_tokens: int = SamplingParams.max_tokens,
        random_weights: bool = False,
        progress: load.Progress = iter,
        on_build: OnBuild = silent,
        say: Callable[[str], None] | None = None,
        **unknown,
    ):
        refuse_unknown("LLM", unknown, _KNOWN, _RENAMED)
        if max_model_len is not None:
            whole("max_model_len", max_model_len, 2, 2**31)
        whole("max_num_seqs", max_num_seqs, 1, 2**31)
        whole("seed", seed, 0, 2**32)
        whole("expect_tokens", expect_tokens, 1, sys.maxsize)
        say = say or (lambda line: print(line, file=sys.stderr))
        env.start()
        if random_weights and str(model).endswith(".json"):
            self.folder = folders.config_only(Path(model))
        else:
            self.folder = folders.read_folder(folders.locate(model))
        if tensor_parallel_size == "auto":
            tensor_parallel_size = self._largest(data_parallel_size, expert_parallel_size, say)
        plan = _one_plan(plan, mesh, tensor_parallel_size, data_parallel_size, expert_parallel_size)
        if patterns is not None:
            if plan.patterns:
                raise UsageError("give patterns once: the plan has some")
            plan = replace(plan, patterns=normal(patterns), allow=tuple(allow))
        dtype = folders.choose_dtype(dtype, self.folder.stored_dtype, plan.platform)
        config = folders.with_dtype(self.folder.config, dtype)
        self.plan, self.seed = plan.fit(config), seed
        if self.plan.mesh.shape != plan.mesh.shape:
            _, expert, tensor, rep = self.plan.mesh.shape.values()
            asked = f"expert={expert} x " * (expert > 1) + f"tensor={tensor * rep}"
            more = self.plan.tensor_degree > config.kv_heads
            say(
                f"{asked} {'is more than' if more else 'does not divide'}"
                f" kv_heads={config.kv_heads}: split into tensor={tensor} x rep={rep}"
            )
        self.max_model_len = max_model_len or min(config.max_position, DEFAULT_MAX_MODEL_LEN)
        if self.max_model_len > config.max_position:
            raise UsageError(
                f"max_model_len={max_model_len} is more than the model's own limit"
                f" max_position_embeddings={config.max_position}"
            )
        on_cpu = self.plan.platform == "cpu"
        # Replicas prefill together what is cut alike: there, fewer ways to cut are better.
        fitted = on_cpu and self.plan.data == 1
        buckets = Buckets.make(self.max_model_len, max_num_seqs, self.plan.data, fitted)
        narrow = on_cpu and dtype == "float32"
        narrow = narrow and self.folder.stored_dtype == "bfloat16"
        # Exact all the same, in half the bytes: they are widened where they are multiplied.
        self.config = replace(config, matrix_dtype="bfloat16") if narrow else config
        self.table = WeightTable(self.config, self.plan)
        self.padding = padding(self.table)
        if self.padding.costs:
            say(str(self.padding))
        self.memory = check_memory(self.table, buckets)
        source = None if random_weights else load.open_source(self.folder.path, verify)
        if narrow and source and not load.all_bfloat16(source):  # some are wider than it says
            self.config, self.table = config, WeightTable(config, self.plan)
            self.padding, self.memory = padding(self.table), check_memory(self.table, buckets)
        self.eos_ids = folders.eos_ids(self.folder.generation)
        if on_cpu and dtype != "float16" and not native.ready():
            say(f"no kernels of our own for this CPU, XLA's are slower: {native.why_not()}")
        self.executables = Executables(self.table, buckets, on_build)
        self.tokenizer = None
        prompts = as_prompts(expect)
        ready = functools.partial(self._get_ready, prompts, expect_tokens, not random_weights)
        progress = _beside(ready, progress)
        if source is None:
            self.weights = load.random(self.table, seed, progress)
        else:
            self.weights = load.load(self.table, self.folder.family, source, progress)
        if on_cpu and not fast_on_cpu(dtype):
            say(
                f"{dtype} products have no fast path on this CPU and take several times as long as"
                " they should: import tpjax before jax is first used, or take dtype=float32"
            )
        self._engine = Engine(self.weights, self.executables)
        self._count = itertools.count()

    def _get_ready(self, prompts: list[Prompt], more: int, tokenizer: bool) -> None:
        """What needs no weights: executables for these prompts, and the tokenizer."""
        if tokenizer:
            self.tokenizer = load_tokenizer(self.folder)
        if prompts:
            lengths = [len(self._ids(prompt)) for prompt in prompts]
            asked = [((n,), self._context(n, more)) for n in lengths]
            self.executables.build(self.executables.for_requests(asked))

    def _largest(self, data: int | None, expert: int | None, say: Callable[[str], None]) -> int:
        data, expert = (1 if n is None else n for n in (data, expert))
        whole("data_parallel_size", data, 1, 2**31)
        whole("expert_parallel_size", expert, 1, 2**31)
        degree, each = largest_degree(self.folder.config, data, expert)
        if degree < each:
            of = each * data * expert
            say(f"using {degree * data * expert} of {of} devices: more would need padding")
        return degree

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation config suggests; greedy if it does not say ``do_sample``."""
        generation = self.folder.generation
        if not generation.get("do_sample"):
            return SamplingParams(temperature=0.0)
        words = ("temperature", "top_k", "top_p", "min_p")
        try:
            return SamplingParams(**{w: generation[w] for w in words if w in generation})
        except UsageError as error:
            raise CheckpointError(f"{self.folder.path}: generation_config.json: {error}") from error

    def warm_up(self) -> None:
        """Build every executable `generate` and `stream` can use: they compile nothing after this
        (`logits` has its own)."""
        self.executables.build(self.executables.all_names())

    def _build_for(self, requests: list[Request]) -> None:
        asked = [(request.prefilled(), request.context) for request in requests]
        self.executables.build(self.executables.for_requests(asked))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[Request], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many (text or token ids), in the order given.

        Raises UsageError for a prompt or a parameter that cannot be meant, before anything runs.
        """
        requests = self._requests(prompts, sampling_params)
        if not requests:
            return []
        self._build_for(requests)
        for request in self._engine.run(requests):
            if on_progress:
                on_progress(request)
        return [request.output() for request in requests]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[Request], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, through the tokenizer's own chat template.

        A conversation is a list of ``{"role": ..., "content": ...}``. Otherwise like `generate`
        with token ids: ``prompt`` of an output is None. Raises UsageError, before anything runs,
        also for what the template refuses.
        """
        return self.generate(self.chat_prompts(messages), sampling_params, on_progress=on_progress)

    def chat_prompts(self, messages: Conversation | Sequence[Conversation]) -> list[list[int]]:
        """The token ids `chat` completes, a list per conversation; `stream` takes one of them."""
        return chat_ids(self.tokenizer, messages, self.folder.path)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        on_progress: Callable[[Request], None] | None = None,
    ) -> Iterator[str]:
        """Yield one prompt's text as it is made; its pieces joined are what `generate` returns."""
        requests = self._requests(prompt, sampling_params)
        if len(requests) != 1:
            raise UsageError("stream takes one prompt; use generate for several")
        if self.tokenizer is None:
            raise UsageError(f"{self.folder.path}: no tokenizer, so there is no text to stream")
        self._build_for(requests)
        return self._pieces(requests, on_progress)

    def _pieces(self, requests: list[Request], on_progress) -> Iterator[str]:
        for request in self._engine.run(requests, tokens=1):
            if on_progress:
                on_progress(request)
            if text := request.new_text():
                yield text

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Float32 ``[T, V]``: what the model says after each of these tokens, for evaluation."""
        parts = [
            out[0, :count, : self.config.vocab] for out, count in self._run("score", token_ids)
        ]
        return np.concatenate(parts)

    def states(self, token_ids: Sequence[int]) -> np.ndarray:
        """Float32 ``[L + 2, T, D]``: the residual stream after the embedding, after every block and
        after the final norm, for comparing with another implementation."""
        parts = [out[:, 0, :count] for out, count in self._run("states", token_ids)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _run(self, kind: str, token_ids: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
        """A step over a prompt, chunk by chunk: its result, and how many tokens of it are real."""
        ids = check_ids(list(token_ids), self.config.vocab, self.max_model_len, room=0)
        exe = self.executables
        cache, start = exe[f"zeros[b{exe.one}]"](), 0
        length = exe.upload(np.full(exe.one, len(ids), np.int32))
        for size in exe.buckets.chunk_sizes(len(ids)):
            token = np.zeros((exe.one, size), np.int32)
            part = ids[start : start + size]
            token[:, : len(part)] = part
            begin = np.full(exe.one, start, np.int32)
            cache, out = exe[f"{kind}[t{size}]"](
                self.weights, cache, exe.upload(token), exe.upload(begin), length
            )
            yield np.asarray(out), len(part)
            start += size

    def _requests(self, prompts, sampling_params) -> list[Request]:
        many = as_prompts(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        each = as_params(sampling_params, len(many))
        ids = [self._ids(prompt) for prompt in many]
        for params in each:
            if params.stop and self.tokenizer is None:
                raise UsageError("stop strings need a tokenizer; use stop_token_ids")
            beyond = [i for i in params.stop_token_ids if i >= self.config.vocab]
            if beyond:
                raise UsageError(f"stop_token_ids {beyond}: outside vocab={self.config.vocab}")
        # Only now, so that a refused call does not change what later ones draw.
        return [self._request(*of) for of in zip(many, ids, each, strict=True)]

    def _ids(self, prompt: Prompt) -> list[int]:
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        return check_ids(ids, self.config.vocab, self.max_model_len, room=1)

    def _request(self, prompt: Prompt, ids: list[int], params: SamplingParams) -> Request:
        number = next(self._count)
        return Request(
            id=str(number),
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=ids,
            params=params,
            seed=params.seed if params.seed is not None else (self.seed << 32) + number,
            eos_ids=self.eos_ids,
            max_tokens=min(params.max_tokens, self.max_model_len - len(ids)),
            context=self._context(len(ids), params.max_tokens),
            tokenizer=self.tokenizer,
            recomputed_at=self.config.rope.recomputed_at if self.config.rope else None,
        )

    def _context(self, prompt: int, more: int) -> int:
        """Cache positions for a prompt of so many tokens and so many after it."""
        return self.executables.buckets.context_for(min(prompt + more, self.max_model_len))

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise UsageError(f"{self.folder.path}: no tokenizer; give token ids instead of text")
        if not text:
            raise UsageError("empty prompt: give at least one character")
        try:
            return self.tokenizer.encode(text)
        except Exception as error:  # half of a surrogate pair, for one
            raise UsageError(f"prompt {text[:40]!r}: the tokenizer refuses it ({error})") from error


def _beside(job: Callable[[], None], progress: load.Progress) -> load.Progress:
    """``progress`` that does ``job`` beside the weights' loading, once that has begun, and raises
    what it raises."""

    def watched(specs):
        with ThreadPoolExecutor(max_workers=1) as pool:
            done = pool.submit(job)
            for spec in progress(specs):
                if done.done():
                    done.result()
                yield spec
            done.result()

    return watched


def _one_plan(plan, mesh, tensor, data, expert) -> Plan:
    """Exactly one of: a plan, a mesh, or sizes."""
    sizes = {"tensor": tensor, "data": data, "expert": expert}
    sizes = {axis: size for axis, size in sizes.items() if size is not None}
    if sum((plan is not None, mesh is not None, bool(sizes))) > 1:
        raise UsageError("give one of plan, mesh, or tensor_parallel_size/data_parallel_size")
    if plan is not None:
        if not isinstance(plan, Plan):
            raise UsageError(f"plan={plan!r}: give a tpjax.Plan")
        return plan
    if mesh is None:
        mesh = make_mesh(**sizes)
    check_axes(mesh)
    return Plan(mesh=mesh)
