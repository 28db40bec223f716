"""A Python that starts at once. PyTorch and a few others take seconds to import, and the tests start some two hundred processes: so a server imports
them once, and forks for each process that is asked for. Further ones have Hugging Face's libraries too: one for scripts and one for notebooks, since
tqdm and transformers settle on import which of them they are in, and one for scripts that find DeepSpeed. sftkit is imported in the fork, as in any new process.

`start()` gives the path of a program to use in place of `sys.executable`. It hands its words, environment, folder and open files to the server,
passes signals on, ends as the fork ends, and the fork ends with it. Where a fork would not be what a new process is (options of Python, variables that
are read by what is imported already), it is the real Python.
"""
import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
import unittest.mock

from running import PYTHON, environment

IMPORTED = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint", "pandas", "pyarrow.parquet",
            "bitsandbytes", "wandb", "psutil", "jinja2", "yaml", "httpx")      # nothing of IPython, by which tqdm knows a notebook
HUGGING_FACE = ("transformers", "transformers.trainer", "accelerate", "datasets", "peft", "trl", "trl.trainer.sft_trainer", "transformers.models.llama.modeling_llama", "peft.tuners.lora")
SCRIPT = ("ipywidgets", "anywidget")                            # after tqdm has seen that this is no notebook
DEEPSPEED = os.path.join(sys.prefix, "deepspeed")              # where `make test` puts it
NOTEBOOK = ("IPython", "ipykernel.kernelapp", "ipykernel.ipkernel", "ipykernel.zmqshell", "ipywidgets", "anywidget", "tqdm.auto")
READ = ("PYTORCH_", "TORCH_", "TORCHINDUCTOR", "CUDA_HOME", "WANDB", "BNB", "HOME", "PYTHONHASHSEED", "PYTHONWARNINGS", "PYTHONHOME", "LD_")      # variables that those read on import
READ_TOO = ("HF_", "HUGGING", "TRANSFORMERS_", "ACCELERATE_", "DS_", "USE_", "XDG_", "DISABLE_TELEMETRY")                      # and these, beside what they find on PYTHONPATH: deepspeed
SET_LATER = ("TORCH_NCCL", "TORCHINDUCTOR_CACHE_DIR")          # by torchrun and by PyTorch, without a meaning for what is imported
CLIENT = '''#!{python} -SI
import json, os, signal, socket, struct, sys
words = sys.argv[1:]
def kept(names): return {{k: v for k, v in os.environ.items() if k.startswith(names) and not k.startswith({set_later!r})}}
plain = words[1:] if words[:1] == ["-u"] else words
if not plain or plain[0].startswith("-") and plain[0] not in ("-m", "-c") or kept({read!r}) != {kept!r}: os.execv({python!r}, [{python!r}, *words])
server, parent = socket.socket(socket.AF_UNIX), os.getppid()
places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sharing = {deepspeed!r} in places and os.path.isdir({deepspeed!r})
other = kept({read_too!r}) != {kept_too!r} | (dict(DS_ACCELERATOR="cpu") if sharing else dict()) or any("deepspeed" in p for p in places) > sharing
server.connect({address!r} + ("" if other else ".deepspeed" if sharing else ".notebook" if "ipykernel_launcher" in plain else ".script"))
asked = json.dumps(dict(words=words, env=dict(os.environ), folder=os.getcwd())).encode()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT): signal.signal(number, lambda n, frame: server.send(bytes([n])))
socket.send_fds(server, [struct.pack("!I", len(asked))], [0, 1, 2])
server.sendall(asked)
if "JPY_PARENT_PID" in os.environ: server.settimeout(1)                 # a kernel ends with what started it
while True:
    try: code, = struct.unpack("!i", server.recv(4)); break
    except TimeoutError: os.getppid() == parent or os._exit(1)
if code >= 0: os._exit(code)
if -code != signal.SIGKILL: signal.signal(-code, signal.SIG_DFL)
os.kill(os.getpid(), -code)
'''


@contextlib.contextmanager
def start(
    *more, # modules that are imported too
):
    "The path of the program that asks a server, which lives as long as this context."
    if not hasattr(os, "pidfd_open"): yield PYTHON; return          # Linux alone has it
    with tempfile.TemporaryDirectory(prefix="sftkit-warm-") as folder:
        process = subprocess.Popen([PYTHON, __file__, f"{folder}/server", *more], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        try: yield _program(folder)
        finally: process.communicate(timeout=60)


def _program(folder):
    address, program = f"{folder}/server", f"{folder}/python"
    def kept(names): return {k: v for k, v in environment().items() if k.startswith(names) and not k.startswith(SET_LATER)}
    with open(program, "w") as file: file.write(CLIENT.format(python=PYTHON, read=READ, kept=kept(READ), read_too=READ_TOO, kept_too=kept(READ_TOO), set_later=SET_LATER, address=address,
                                                                 deepspeed=DEEPSPEED))
    os.chmod(program, 0o755)
    return program


def serve(address, *modules):
    "Returns in each fork, with what was asked for and the program to start others with."
    listeners = {kind: socket.socket(socket.AF_UNIX) for kind in ("", ".script", ".notebook", ".deepspeed") if kind != ".deepspeed" or os.path.isdir(DEEPSPEED)}
    for kind, listener in listeners.items():
        listener.bind(address + kind)
        listener.listen(64)
    print("who asks waits", flush=True)
    for name in modules: importlib.import_module(name)
    own = next((kind for kind in listeners if kind and not os.fork()), "")
    if own == ".deepspeed":
        sys.path.append(DEEPSPEED)
        os.environ["DS_ACCELERATOR"] = "cpu"
        for name in HUGGING_FACE + SCRIPT + ("deepspeed",): importlib.import_module(name)
    if own == ".script":
        for name in HUGGING_FACE + SCRIPT: importlib.import_module(name)
    if own == ".notebook":
        import IPython
        with unittest.mock.patch("IPython.get_ipython", lambda: types.SimpleNamespace(config={"IPKernelApp": {}})):
            for name in NOTEBOOK + HUGGING_FACE: importlib.import_module(name)
    gc.freeze()                                                         # what is imported is not looked through again in each fork
    for kind in listeners.keys() - {own}: listeners[kind].close()
    with listeners[own] as listener, selectors.DefaultSelector() as selector:
        children = {}                                                   # connection: pid
        selector.register(listener, selectors.EVENT_READ, "asked")
        selector.register(0, selectors.EVENT_READ, "over")
        while True:
            for key, _ in selector.select():
                if key.data == "over":
                    for pid in children.values(): os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                elif key.data == "asked":
                    connection, _ = listener.accept()
                    head, files, _, _ = socket.recv_fds(connection, 4, 3)
                    with connection.makefile("rb") as reader: asked = json.loads(reader.read(*struct.unpack("!I", head)))
                    pid = os.fork()
                    if not pid:
                        for other in (connection, *children): other.close()
                        return asked, files
                    for file in files: os.close(file)
                    children[connection] = pid
                    selector.register(connection, selectors.EVENT_READ, "told")
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, connection)
                elif key.data == "told":
                    if numbers := key.fileobj.recv(16): [os.kill(children[key.fileobj], n) for n in numbers]
                    else: os.kill(children[key.fileobj], signal.SIGKILL); selector.unregister(key.fileobj)      # who asked was killed
                else:
                    code = os.waitstatus_to_exitcode(os.waitpid(children.pop(key.data), 0)[1])
                    selector.unregister(key.fd); os.close(key.fd)
                    try: selector.unregister(key.data); key.data.send(struct.pack("!i", code))
                    except (KeyError, BrokenPipeError): pass
                    key.data.close()


def become(asked, files, program):
    "This process as the one that was asked for, up to its first line; returns what runs it."
    import runpy
    import torch
    for number, file in enumerate(files): os.dup2(file, number); os.close(file)
    os.environ.clear(); os.environ.update(asked["env"])
    os.environ.pop("JPY_PARENT_PID", None)                              # is the client's business
    os.chdir(asked["folder"])
    unbuffered = os.environ.get("PYTHONUNBUFFERED") or asked["words"][0] == "-u"
    def text(number, errors, lines): return io.TextIOWrapper(open(number, "wb", closefd=False), encoding="utf-8", errors=errors, line_buffering=bool(lines))
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), text(1, "strict", unbuffered or os.isatty(1)), text(2, "backslashreplace", True)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    if os.environ.get("PYTHONFAULTHANDLER"): __import__("faulthandler").enable()
    if threads := os.environ.get("OMP_NUM_THREADS"): torch.set_num_threads(int(threads))
    kind, *words = asked["words"][1:] if asked["words"][0] == "-u" else asked["words"]
    sys.executable = program
    path = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    first = os.getcwd() if kind == "-m" else "" if kind == "-c" else os.path.dirname(os.path.abspath(kind))
    sys.path[:] = [first, *path, *[p for p in sys.path[1:] if p not in OWN]]
    importlib.invalidate_caches()
    del sys.modules["__main__"]
    if kind == "-m":
        sys.argv = words
        return lambda: runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    sys.argv = ["-c", *words[1:]] if kind == "-c" else [kind, *words]
    if kind != "-c": return lambda: runpy.run_path(kind, run_name="__main__")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    return lambda: exec(compile(words[0], "<string>", "exec"), main.__dict__)


def run(main):
    "Run to the end of the process, without taking apart what the server has imported."
    code = 0
    try: main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException as e:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr): stream.flush()
    if code >= 0: os._exit(code & 255)
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


if __name__ == "__main__":
    OWN = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    run(become(*serve(sys.argv[1], *IMPORTED, *sys.argv[2:]), os.path.join(os.path.dirname(sys.argv[1]), "python")))
