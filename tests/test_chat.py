"""Conversations: their tokens are transformers' own, and what no template takes is one line."""

import io
import json
import shutil

import pytest
import transformers

import tpjax
from tests.bad import edit_json, refused
from tpjax import SamplingParams, cli
from tpjax.checkpoint import folder as folders
from tpjax.errors import UsageError

# Gemma's rules and Llama's begin of text; what a template that adds its own special tokens looks
# like. Roles and contents are trimmed, so that text which is only joined would differ.
TEMPLATE = """\
{{ bos_token }}\
{% if messages[0]['role'] == 'system' %}\
{{ '[' + messages[0]['content'] | trim + ']\n' }}{% set messages = messages[1:] %}\
{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate\nuser/assistant/user/assistant/...') }}\
{% endif %}\
{{ message['role'] | upper + ':\n' + message['content'] | trim + '\n\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'ROMEO:\n' }}{% endif %}"""
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TEMPLATE
)
ASK = [{"role": "user", "content": " Who is Juliet? "}]
LONGER = [
    {"role": "system", "content": "Be brief."},
    *ASK,
    {"role": "assistant", "content": "The sun."},
    {"role": "user", "content": "And the moon?"},
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
WORDS = "--quiet --max-tokens 6 --temperature 0 -tp 1 --max-model-len 128".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled model, as if it had been taught to chat."""
    folder = shutil.copytree(folders.bundled(), tmp_path_factory.mktemp("chat") / "model")
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def llm(model):
    return tpjax.LLM(model, max_model_len=128, max_num_seqs=2, say=lambda line: None)


@pytest.fixture(scope="module")
def expected(model):
    """What transformers makes of a conversation, and its template of the text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def ids(conversation):
        out = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
        return list(out["input_ids"])

    assert tokenizer.decode(ids(ASK)) == "<|begin_of_text|>USER:\nWho is Juliet?\n\nROMEO:\n"
    return ids


# --- what reaches the engine


@pytest.mark.parametrize("conversation", [ASK, LONGER, tuple(ASK), iter(list(ASK))])
def test_one_conversation(llm, expected, conversation):
    (output,) = llm.chat(conversation, GREEDY)
    want = expected(LONGER if conversation is LONGER else ASK)
    assert output.prompt_token_ids == want and output.prompt is None
    assert want.count(llm.tokenizer.bos_token_id) == 1
    (plain,) = llm.generate(want, GREEDY)
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert output.outputs[0].text == plain.outputs[0].text != ""


def test_several_conversations(llm, expected):
    """In the order given, each with its own parameters; a list of one is one."""
    each = [GREEDY, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True), GREEDY]
    seen = set()
    many = [ASK, LONGER, LONGER[:2]]
    outputs = llm.chat(many, each, on_progress=lambda request: seen.add(request.id))
    assert [o.prompt_token_ids for o in outputs] == [expected(one) for one in many]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [6, 3, 6]
    assert seen == {o.request_id for o in outputs}
    assert [o.prompt_token_ids for o in llm.chat([LONGER], GREEDY)] == [expected(LONGER)]


def test_a_conversation_can_be_streamed(llm, expected):
    (ids,) = llm.chat_prompts(LONGER)
    assert ids == expected(LONGER)
    pieces = list(llm.stream(ids, GREEDY))
    assert len(pieces) > 1 and "".join(pieces) == llm.chat(LONGER, GREEDY)[0].outputs[0].text


def test_the_models_own_end_ends_an_answer(llm, monkeypatch):
    first = llm.chat(ASK, GREEDY)[0].outputs[0].token_ids[0]
    monkeypatch.setattr(llm, "eos_ids", (first,))
    answer = llm.chat(ASK, SamplingParams(temperature=0.0, max_tokens=6))[0].outputs[0]
    assert (answer.token_ids, answer.finish_reason) == ([first], "stop")


def test_messages_are_not_changed_and_may_say_more(llm, expected, monkeypatch):
    """What a template may ask for besides role and content reaches it."""
    named = [{**ASK[0], "name": "Nurse"}]
    before = json.dumps(named)
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ messages[0]['name'] }}")
    (ids,) = llm.chat_prompts(named)
    assert llm.tokenizer.decode(ids) == "Nurse" and json.dumps(named) == before


# --- refusals


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], ("messages: an empty conversation", "at least one message")),
        ([ASK, []], ("messages[1]: an empty conversation",)),
        ("Who?", ("messages='Who?'", "a list of")),
        (ASK[0], ("messages={'role': 'user'", "a list of")),
        (None, ("messages=None", "a list of")),
        (5, ("messages=5", "a list of")),
        (["Who?"], ("messages[0]='Who?'", "both text")),
        ([*ASK, "Who?"], ("messages[1]='Who?'", "both text")),
        ([ASK, "Who?"], ("messages[0]=[{'role'", "both text")),
        ([ASK, [{"role": "user"}]], ("messages[1][0]={'role': 'user'}", "both text")),
        ([{"content": "Who?"}], ("messages[0]={'content': 'Who?'}", "both text")),
        ([{"role": "user", "content": None}], ("messages[0]=", "None", "both text")),
        ([{"role": 1, "content": "Who?"}], ("messages[0]=", "both text")),
        ([{"role": "user", "content": [{"type": "text"}]}], ("messages[0]=", "both text")),
        ([*ASK, *ASK], ("messages: ", "roles must alternate user/assistant", "change")),
        ([ASK, LONGER[2:]], ("messages[1]: ", "roles must alternate", "plain prompt")),
        ([{"role": "user", "content": "\ud800"}], ("messages: ", "refuses", "change")),
        ([{"role": "user", "content": "far " * 300}], ("the prompt has", "max_model_len=128")),
    ],
)
def test_conversations(llm, messages, said):
    """Refused before anything runs, also when only one of several is wrong."""
    before = next(llm._count)
    with refused(UsageError, *said):
        llm.chat(messages, GREEDY)
    assert next(llm._count) == before + 1, "a refused call draws no number"


@pytest.mark.parametrize(
    "template, said",
    [
        (NO_SYSTEM, "System role not supported"),
        ("{{ messages[0]['content'] + nothing }}", "'nothing' is undefined"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{% for %}", "Expected"),
        ({"tool_use": TEMPLATE}, "multiple chat templates"),
    ],
)
def test_a_template_that_refuses(llm, monkeypatch, template, said):
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    with refused(UsageError, "messages: the tokenizer's chat template refuses", said, "change"):
        llm.chat(LONGER, GREEDY)


@pytest.mark.parametrize(
    "code",
    [
        "cycler.__init__.__globals__.os.system('touch ' ~ messages[0]['content'])",
        "raise_exception.__globals__['__builtins__']['open'](messages[0]['content'], 'w')",
        "().__class__.__base__.__subclasses__()",
        "messages.append(1)",
    ],
)
def test_a_template_that_reaches_for_more_than_text(llm, monkeypatch, tmp_path, code):
    """It runs in the sandbox only."""
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ " + code + " }}")
    with refused(UsageError, "chat template refuses", "unsafe"):
        llm.chat([{"role": "user", "content": str(tmp_path / "made")}], GREEDY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_template(llm, monkeypatch, template):
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    with refused(UsageError, llm.folder.path, "no chat template", "generate with a plain prompt"):
        llm.chat(ASK, GREEDY)


def test_a_model_without_a_tokenizer(folder, quiet):
    llm = tpjax.LLM(folder, **quiet)
    for call in llm.chat, llm.chat_prompts:
        with refused(UsageError, llm.folder.path, "no tokenizer", "token ids"):
            call(ASK)


# --- the command


@pytest.fixture
def chat(model, capsys, monkeypatch):
    """`tpjax generate --chat` in this process -> (exit code, stdout, stderr)."""

    def run(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = cli.main(["generate", "--model", str(model), "--chat", *WORDS, *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("system", [None, "Be brief.", ""])
def test_every_prompt_is_a_users_message(chat, llm, system):
    """Each a conversation of its own, with the system's message, if any, before it."""
    words = [] if system is None else ["--system", system]
    prompts = ["Who is Juliet?", "And the moon?"]
    code, out, err = chat(
        "--prompt", prompts[0], *words, "--prompts-file=-", "--json", stdin="And the moon?\n"
    )
    assert (code, err) == (0, "")
    before = [] if system is None else [{"role": "system", "content": system}]
    asked = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
    outputs = llm.chat(asked, SamplingParams(temperature=0.0, max_tokens=6, seed=0))
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "prompt": prompt,
            "text": output.outputs[0].text,
            "token_ids": output.outputs[0].token_ids,
            "finish_reason": output.outputs[0].finish_reason,
        }
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def test_an_answer_as_text_whole_and_streamed(chat, llm):
    words = ["--prompt", "Who is Juliet?", "--prompt", "And the moon?", "--system", "Be brief."]
    code, whole, _ = chat(*words)
    streamed = chat(*words, "--stream")
    assert code == 0 and streamed == (0, whole, "")
    first = llm.chat([LONGER[0], {"role": "user", "content": "Who is Juliet?"}], GREEDY)
    assert whole.startswith(first[0].outputs[0].text + "\n")


def test_the_message_is_shown_above_its_answer(chat, monkeypatch):
    monkeypatch.setitem(globals(), "WORDS", [word for word in WORDS if word != "--quiet"])
    for more in [], ["--stream"]:
        code, _, err = chat("--prompt", "Who is Juliet?", *more)
        assert code == 0 and "\nWho is Juliet?\n" in err and "tokens/s" in err


@pytest.mark.parametrize(
    "words, told",
    [
        ("--system x", "--system is a message of a conversation: give --chat too"),
        ("--prompt x --system=", "give --chat too"),
        ("--chat", "no message to answer: give --prompt or --prompts-file"),
        ("--chat --prompt=", "empty prompt"),
        ("--chat --prompt x", "the tokenizer has no chat template"),
        ("--chat --prompt x --stream", "the tokenizer has no chat template"),
    ],
)
def test_what_is_wrong_with_the_command(capsys, words, told):
    """With the bundled model as it is: it continues plays and has no template."""
    code = cli.main(["generate", "--quiet", *words.split()])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "") and told in captured.err
    assert captured.err.startswith("tpjax: error: ") and captured.err.count("\n") == 1


def test_a_refusing_template_ends_the_command(chat, model, monkeypatch, tmp_path):
    strict = shutil.copytree(model, tmp_path / "strict")
    edit_json(strict / "tokenizer_config.json", chat_template=NO_SYSTEM)
    code, out, err = chat("--prompt", "x", "--system", "y", "--model", str(strict))
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "messages[0]: the tokenizer's chat template refuses this (System role not" in err
