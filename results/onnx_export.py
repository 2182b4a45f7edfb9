"""The figures of docs/export.md on ONNX: a run's probabilities beside those of its model.onnx.

    python results/onnx_export.py RUN
    python results/onnx_export.py RUN node_modules/onnxruntime-web/dist

RUN is a finished run on pictures. All of its test split goes through the run and through ONNX Runtime; with the second
argument, 50 of these files, evenly spaced, through docs/examples/classify.html in Chromium as well. Prints JSON.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime

from pspinal_jax import load_run
from pspinal_jax.data import load_data

PAGE = Path(__file__).parents[1] / "docs" / "examples" / "classify.html"
IN_BROWSER, BATCH = 50, 32
CHECK = """<script>
(async () => {
  const found = [], start = performance.now();
  for (const name of await (await fetch("pictures.json")).json())
    found.push(await classify(await (await fetch(name)).blob()));
  await fetch("/", {method: "POST", body: JSON.stringify([found, (performance.now() - start) / 1000])});
})();
</script>"""


def main(run, web=None):
    """Export, compare, print."""
    with tempfile.TemporaryDirectory() as folder:
        export = Path(folder) / "export"
        opened = load_run(run)
        start = time.perf_counter()
        opened.export(export, format="onnx")
        seconds = time.perf_counter() - start
        split = load_data(opened.recipe.data, needs_test=False).test
        files = [Path(split.name(index)) for index in range(len(split))]
        names, answers = opened.class_names, opened.predict(files, top=len(opened.class_names))
        expected = np.array([[dict(answer.classes)[name] for name in names] for answer in answers])
        is_known = np.array([answer.known is not False for answer in answers])
        found, scores, per_second = through_onnxruntime(export / "model.onnx", split, opened.config["input_shape"][:2])
        sizes = {path.name: path.stat().st_size for path in export.iterdir()}
        report = {"export_seconds": seconds, "bytes": sizes, "python": compare(found, expected)}
        report["python"]["per_second"] = per_second
        if scores is not None:
            threshold = json.loads((export / "export.json").read_text())["unknown"]["threshold"]
            report["python"]["same_known"] = int(((scores >= threshold) == is_known).sum())
            report["python"]["known"] = int(is_known.sum())
        if web is not None:
            numbers = np.linspace(0, len(files) - 1, IN_BROWSER).astype(int)
            rows, seconds = in_browser(export, Path(web), [files[number] for number in numbers])
            known = [row["known"] for row in rows]
            rows = np.array([[dict(row["classes"])[name] for name in names] for row in rows])
            report["browser"] = compare(rows, expected[numbers]) | {"per_second": IN_BROWSER / seconds}
            report["browser"]["same_known"] = int(sum(np.equal(known, is_known[numbers])))
    print(json.dumps(report, indent=2))


def compare(found, expected):
    """How far two arrays of probabilities [N, C] agree."""
    return {
        "pictures": len(found),
        "same_class": int((found.argmax(1) == expected.argmax(1)).sum()),
        "largest_difference": float(np.abs(found - expected).max()),
    }


def through_onnxruntime(path, split, size):
    """Probabilities [N, C] and scores [N] (or None) of a split's pictures; pictures a second, decoding left out."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names, parts, seconds = [output.name for output in session.get_outputs()], [], 0.0
    for first in range(0, len(split), BATCH):
        images = np.stack([split.read(index, tuple(size)) for index in range(first, min(first + BATCH, len(split)))])
        start = time.perf_counter()
        parts.append(session.run(names, {"images": images}))
        seconds += time.perf_counter() - start
    found = dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))
    return found["probabilities"], found.get("scores"), len(split) / seconds


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what is posted."""

    def do_POST(self):
        """Take the page's answer."""
        self.server.answer = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.answered.set()

    def log_message(self, *_):
        """Say nothing."""


def in_browser(export, web, files):
    """What the page's `classify` says of each of `files`, and how many seconds that took."""
    site = export.parent / "site"
    site.mkdir()
    for path in (export / "model.onnx", export / "export.json", *web.glob("ort.wasm.min.js")):
        shutil.copy(path, site)
    for path in web.glob("ort-wasm-simd-threaded.*m*"):
        shutil.copy(path, site)
    (site / "check.html").write_text(PAGE.read_text() + CHECK)
    names = [f"{number}{path.suffix}" for number, path in enumerate(files)]
    for name, path in zip(names, files, strict=True):
        shutil.copy(path, site / name)
    (site / "pictures.json").write_text(json.dumps(names))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site))
    server.answered = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/check.html"
    browser = subprocess.Popen(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={site.parent / 'profile'}",
            address,
        ],
        stderr=subprocess.PIPE,
    )
    try:
        if not server.answered.wait(300):
            sys.exit(f"the page did not answer: {browser.stderr}")
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
    return server.answer


if __name__ == "__main__":
    main(*sys.argv[1:])
