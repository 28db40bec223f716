import gc
import importlib.util
import os
import sys
from pathlib import Path

# hermetic: no hub, no telemetry; a renderer that prints nothing clever
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", SFTKIT_RENDERER="plain")
os.environ.setdefault("OMP_NUM_THREADS", "1")                  # tiny models: threads would cost more than they bring
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import running                             # before `sys.executable` is another
import warm
from tiny import save_tiny, write_jsonl

CHAT = [{"messages": [{"role": "user", "content": f"turn {'on' if i % 3 else 'off please'} light {i}" + " in the kitchen" * (i % 4)},
                      {"role": "assistant", "content": f"light {i % 7} " + ("on" if i % 3 else "off") + " now" * (i % 5)}]} for i in range(48)]
TEXT = [{"text": f"Question: what is {i}? " + "Answer: it is " * (1 + i % 3) + f"{i % 5}."} for i in range(40)]


def pytest_xdist_auto_num_workers(config):
    "`-n auto`: one more than there are cores, since a browser, or a process that was started, is often waited for."
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    "Notebooks first: some take minutes, and one that begins last runs alone."
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_project.py::test_notebook_runs"))


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    "Each run looks for what it can free; what was imported need not be looked through every time."
    if importlib.util.find_spec("torch"): import sftkit.training, trl, peft    # noqa: E401
    gc.collect(); gc.freeze()


def pytest_configure(config):
    "Processes that the tests start, or what they test starts, have imported PyTorch when they begin: one server for all workers."
    if hasattr(config, "workerinput"): config.quick_python = config.workerinput["quick_python"]
    elif not config.option.collectonly:
        config.server = warm.start()
        config.quick_python = config.server.__enter__()

def pytest_configure_node(node): node.workerinput["quick_python"] = node.config.quick_python

def pytest_unconfigure(config):
    if hasattr(config, "server"): config.server.__exit__(None, None, None)


@pytest.fixture(scope="session", autouse=True)
def quick_python(pytestconfig):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", pytestconfig.quick_python)
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    "Every test works in a folder of its own, as a user does."
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A tiny Llama whose tokenizer knows the chatml markers."
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", extra=("<|im_start|>", "<|im_end|>"))


@pytest.fixture(scope="session")
def tiny_wide(tmp_path_factory):
    "As `tiny`, with layers of 64 so that bitsandbytes can quantise them."
    return save_tiny(tmp_path_factory.mktemp("tiny") / "wide", extra=("<|im_start|>", "<|im_end|>"), hidden=64)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    "A tiny GPT-2 that has no chat markers and no padding token."
    return save_tiny(tmp_path_factory.mktemp("tiny") / "gpt2", cls="gpt2", pad=None)


@pytest.fixture
def chat_file(tmp_path): return write_jsonl(tmp_path / "chat.jsonl", CHAT)


@pytest.fixture
def text_file(tmp_path): return write_jsonl(tmp_path / "text.jsonl", TEXT)
