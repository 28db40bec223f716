"""Drives JupyterLab or Notebook 7 in headless Chromium, as a person would: open a notebook, run it, look, click, save, reopen.

    with lab(folder) as server:                      # JupyterLab on 127.0.0.1, its settings in a temporary folder
        write_notebook(folder/"x.ipynb", ["1 + 1"])
        with notebook(server, "x.ipynb") as nb:
            nb.run_all()
            nb.screenshot("x.png")

Needs jupyterlab, playwright and a Chromium (SFTKIT_CHROMIUM, else /usr/bin/chromium, else what is on PATH). `missing()` says what is not there.
"""
import contextlib, importlib.util, json, os, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.error, urllib.request
from dataclasses import dataclass
from pathlib import Path

from running import PYTHON, ROOT, environment # noqa: F401

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def chromium():
    "Path of a Chromium, or None."
    found = os.environ.get("SFTKIT_CHROMIUM") or "/usr/bin/chromium"
    return found if Path(found).exists() else shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def missing():
    "What the browser tests need and is not installed, in one line; empty if all is there."
    wanted = [name for name in ("jupyterlab", "notebook", "playwright", "anywidget") if importlib.util.find_spec(name) is None]
    if not chromium(): wanted.append("chromium")
    return f"not installed: {', '.join(wanted)}" if wanted else ""


def write_notebook(path, cells, markdown=()):
    "Write a notebook of code cells (the indices in `markdown` are prose)."
    import nbformat
    nb = nbformat.v4.new_notebook()
    nb.cells = [nbformat.v4.new_markdown_cell(c) if i in markdown else nbformat.v4.new_code_cell(c) for i, c in enumerate(cells)]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, path)
    return Path(path)


def untrusted_copy(path, to):
    "A copy whose signature is unknown, as if it had been downloaded."
    nb = json.loads(Path(path).read_text())
    nb["metadata"]["downloaded"] = time.time()
    for cell in nb["cells"]: cell.get("metadata", {}).pop("trusted", None)
    Path(to).write_text(json.dumps(nb))
    return Path(to)


@dataclass
class Server:
    url: str
    token: str
    root: Path
    browser: object
    log: Path

    def api(self, method, path):
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method, headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=10) as reply: return json.loads(reply.read() or "null")

    def end_sessions(self, seconds=20):
        "Shut down every kernel. Of one that was killed the server refuses it as long as it is starting another in its place."
        end = time.monotonic() + seconds
        while sessions := self.api("GET", "sessions"):
            for session in sessions:
                try: self.api("DELETE", f"sessions/{session['id']}")
                except urllib.error.HTTPError as e:
                    if e.code not in (404, 500): raise
            if time.monotonic() > end: raise TimeoutError(f"kernels that do not end: {sessions}")
            time.sleep(0.05)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_until_up(server, process, seconds=40):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None: break
        try: return server.api("GET", "status")
        except (urllib.error.URLError, ConnectionError, TimeoutError): time.sleep(0.2)
    raise RuntimeError("JupyterLab did not come up:\n" + server.log.read_text()[-3000:])


@contextlib.contextmanager
def headless():
    "A Chromium without a window, driven by Playwright."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)
        try: yield browser
        finally: browser.close()


@contextlib.contextmanager
def lab(root_dir, env=None):
    "A running JupyterLab over `root_dir` and a browser; both are gone afterwards. `env` is added to the environment of its kernels."
    root_dir, port = Path(root_dir).resolve(), _free_port()
    with tempfile.TemporaryDirectory(prefix="sftkit-lab-") as aside, contextlib.ExitStack() as stack:
        token, log = "sftkit-test", Path(aside)/"lab.log"
        kernel_env = environment(OMP_NUM_THREADS="1", IPYTHONDIR=f"{aside}/ipython", **{f"JUPYTER_{k}_DIR": f"{aside}/{k.lower()}" for k in ("CONFIG", "DATA", "RUNTIME")}, JUPYTER_PATH=f"{aside}/data", **(env or {}))
        for name in ("SFTKIT_RENDERER", "VSCODE_PID", "JPY_SESSION_NAME"):
            if name not in (env or {}): kernel_env.pop(name, None)
        command = [PYTHON, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
                   f"--ServerApp.root_dir={root_dir}", "--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True", "--LabApp.news_url=None",
                   "--ServerApp.tornado_settings={'page_config_data': {'buildCheck': False, 'buildAvailable': False}}"]         # else each page starts node
        kernel = Path(aside)/"data"/"kernels"/"python3"/"kernel.json"         # on JUPYTER_PATH, since an environment's own kernel goes before that of the user
        kernel.parent.mkdir(parents=True)
        kernel.write_text(json.dumps(dict(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], display_name="Python 3", language="python")))
        quiet = Path(aside)/"settings"/"@jupyterlab"/"apputils-extension"
        quiet.mkdir(parents=True)
        (quiet/"notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        kernel_env["JUPYTERLAB_SETTINGS_DIR"] = f"{aside}/settings"
        process = subprocess.Popen(command, env=kernel_env, stdout=open(log, "w"), stderr=subprocess.STDOUT, start_new_session=True)
        stack.callback(_end, process)
        server = Server(f"http://127.0.0.1:{port}", token, root_dir, None, log)
        _wait_until_up(server, process)
        server.browser = stack.enter_context(headless())
        try: yield server
        finally:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError): server.end_sessions()


def _end(process):
    "End the server and whatever it started: they are one process group, made by `lab`."
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGTERM)
    try: process.wait(10)
    except subprocess.TimeoutExpired: pass
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait(5)


@contextlib.contextmanager
def notebook(server, name, width=1200, height=1000, dark=False, app="lab", scale=1):
    "A page with notebook `name` (relative to the server's folder) open and its kernel ready. `app`: lab (JupyterLab 4) or notebook (Notebook 7)."
    context = server.browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme="dark" if dark else "light")
    page = context.new_page()
    nb = NotebookPage(server, name, page, app)
    try:
        nb.open(dark)
        yield nb
    finally:
        context.close()


class NotebookPage:
    "One open notebook. `page` is the Playwright page; the methods wait for what they name."
    def __init__(self, server, name, page, app="lab"):
        self.server, self.name, self.page, self.app, self.errors = server, name, page, app, []
        page.on("pageerror", lambda e: self.errors.append(str(e)))

    def open(self, dark=False, kernel=True):
        where = f"lab/workspaces/w{time.time_ns()}/tree/{self.name}?reset&" if self.app == "lab" else f"notebooks/{self.name}?"
        self.page.goto(f"{self.server.url}/{where}token={self.server.token}")
        self._ready(kernel)
        if dark: self.page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        if self.app == "lab": self.page.evaluate("() => { if (!window.jupyterapp.shell.leftCollapsed) window.jupyterapp.commands.execute('application:toggle-left-area'); }")

    def reload(self, kernel=True):
        self.page.reload()
        self._ready(kernel)

    def _ready(self, kernel):
        self.page.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.content?.widgets?.length > 0", timeout=40_000)
        if kernel: self.page.wait_for_function("() => ['idle', 'busy'].includes(window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status)", timeout=40_000)

    def run_all(self, wait=True, seconds=60):
        "Run every cell; with `wait=False` return while it runs."
        self.page.set_default_timeout(seconds * 1000)
        start = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
        self.page.evaluate(f"async () => {{ await {start}; }}" if wait else f"() => {{ {start}; }}")

    def run_cell(self, index, wait=True):
        "Run one cell; the first is 0."
        start = f"(window.jupyterapp.shell.currentWidget.content.activeCellIndex = {index}, window.jupyterapp.commands.execute('notebook:run-cell'))"
        self.page.evaluate(f"async () => {{ await {start}; }}" if wait else f"() => {{ {start}; }}")

    def wait_idle(self, seconds=60):
        "Wait until no cell runs or is queued."
        self.page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle' && !document.querySelector('.jp-InputPrompt')?.closest('.jp-Notebook')?.textContent.includes('[*]:')", timeout=seconds * 1000)

    def interrupt(self):
        "The interrupt button, once the page is connected; a busy kernel need not have answered."
        self.page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.connectionStatus === 'connected'", timeout=40_000)
        self.page.evaluate("() => { window.jupyterapp.commands.execute('kernelmenu:interrupt'); }")

    def save(self):
        self.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.context.save(); }")
        return self.saved()

    def saved(self): return json.loads((self.server.root/self.name).read_text())

    def stored(self, index=0):
        "The outputs of a cell as they would be saved now, as text."
        return json.dumps(self.page.evaluate(f"() => window.jupyterapp.shell.currentWidget.content.widgets[{index}].model.toJSON().outputs"), ensure_ascii=False)

    def output(self, index=0):
        "The output area of a code cell, as a Playwright locator."
        return self.page.locator(".jp-CodeCell").nth(index).locator(".jp-OutputArea").first

    def text(self, index=0): return self.output(index).inner_text()

    def screenshot(self, path, index=None):
        "A PNG of the page, or of one cell's output."
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if index is None: self.page.screenshot(path=str(path))
        else: self.output(index).screenshot(path=str(path))
        return Path(path)


def curve(nb):
    """The training curve as it is drawn: for each column of pixels between the axis and the last step, how high its blue stands, from 0 to 1 of the plot; None where there is none.

    Legend and figures at the ends are no part of it: they stand outside."""
    return nb.page.evaluate("""() => { const c = [...document.querySelectorAll('.sft-chart canvas')].at(-1), ratio = c.width / c.clientWidth, [left, top, , bottom, end] = c.dataset.plot.split(',').map((v) => Math.round(v * ratio));
        const width = end - left, height = bottom - top, d = c.getContext('2d').getImageData(left, top, width, height).data;
        return [...Array(width)].map((_, x) => { let n = 0, sum = 0;
            for (let y = 0; y < height; y++) { const i = 4 * (y * width + x); if (d[i + 3] > 200 && d[i + 2] > 180 && d[i] < 110) { n++; sum += y; } }
            return n ? +(1 - sum / n / height).toFixed(3) : null; }); }""")


def drawn(heights): return sum(h is not None for h in heights) / len(heights)      # share of the columns


def needed():
    "Leave a module's tests out where there is no browser. With SFTKIT_BROWSER=required, as `.ci/run` sets it, that is an error instead."
    import pytest
    if not (why := missing()): return
    if os.environ.get("SFTKIT_BROWSER") == "required": raise RuntimeError(f"The browser tests must run here, and cannot: {why}")
    pytest.skip(f"browser tests: {why}", allow_module_level=True)
