"""Do the tests notice a changed line? One line of the package changed at a time, and the tests that run it.

python results/mutants.py [--number 150] [--seed 0] [--workers 2]    # goes on where it was stopped

First every test of `make test` runs, and which lines it runs is written down (Python 3.12 and newer). Then each mutant
is tried in a copy of the tree, on the tests that run its line, then on the others of the same files, the fastest first,
until one fails or `--seconds` of tests have passed. A line of results/mutants.jsonl each; a table and the survivors at
the end. Lines that no test runs count as survived. How a plot looks, what an error says and the table of published
files are not changed.
"""

import argparse
import ast
import collections
import concurrent.futures
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "pspinal_jax"
CACHE = REPOSITORY / ".cache" / "mutants"
ROOMS = {
    "heads": ["heads"],
    "layers": ["layers"],
    "training": ["training"],
    "comparison": ["comparison"],
    "metrics": ["runs/scores.py"],
    "checkpoints": ["checkpoints"],
    "data": ["data"],
}
"""What is changed, below the package."""
TESTS = ("runs", "heads", "training", "reliability", "comparison", "data", "commands", "backbones", "interop")
TESTS += ("checkpoints", "weights", "recipes", "augment", "compatibility", "results", "distributed")
"""Which tests run, below tests/."""

SWAPPED: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
NAMES = {"min": "max", "minimum": "maximum", "floor": "ceil", "argmin": "argmax", "any": "all", "zeros": "ones"}
NAMES |= {new: old for old, new in NAMES.items()}
ALIKE = {ast.Name, ast.Attribute, ast.Subscript, ast.BinOp}
"""Arguments that may be taken for each other."""
PLOTS = ("axis", "axes", "figure", "left", "right", "matplotlib", "image", "_figure", "Figure")


def changes(node: ast.AST, stated: bool) -> Iterator[tuple[str, ast.AST]]:
    """(operator, what stands in the place of `node`); `stated` where it is a statement that may go."""
    new: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        new.ops[0] = SWAPPED[type(node.ops[0])]()
        yield "comparison", new
    elif isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPPED:
        new.op = SWAPPED[type(node.op)]()
        yield "operator", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "dropped sign or not", new.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        for step in (1, -1):
            yield "constant", ast.Constant(node.value + step)
    elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        if name in NAMES:
            setattr(new, "attr" if isinstance(node, ast.Attribute) else "id", NAMES[name])
            yield "function", new
    elif isinstance(node, ast.IfExp | ast.If):
        yield "negated condition", ast.UnaryOp(ast.Not(), node.test)  # of an If, in the place of its condition
    elif isinstance(node, ast.Call) and len(node.args) > 1 and len({type(arg) for arg in node.args[:2]} - ALIKE) == 0:
        new.args[0], new.args[1] = new.args[1], new.args[0]
        yield "swapped arguments", new
    elif stated and isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Continue | ast.Break):
        yield "removed statement", ast.Pass()


def walk(node: ast.AST, lines: tuple[int, int], inside: bool) -> Iterator[tuple[ast.AST, tuple[int, int], bool]]:
    """(node, lines of its statement, whether in a function) of all that is worth changing: no words, no types."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            types = name in ("annotation", "returns", "decorator_list", "type_params", "bases")
            words = isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom) or (
                isinstance(child, ast.Expr)
                and (isinstance(child.value, ast.Constant) or ast.unparse(child.value).startswith(PLOTS))
            )
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            called = ast.unparse(child.func) if isinstance(child, ast.Call) else ""
            said = called in ("warn", "cast", "TypeVar") or called.partition(".")[0].partition("[")[0] in PLOTS
            plots = isinstance(child, ast.FunctionDef) and child.name.startswith("plot_")
            if not isinstance(child, ast.AST) or types or words or typing or said or plots:
                continue
            where, within = lines, inside
            if isinstance(child, ast.stmt):
                body: list[ast.stmt] = getattr(child, "body", [])
                where = (child.lineno, max(child.lineno, body[0].lineno - 1) if body else child.end_lineno or 0)
                within = inside or isinstance(node, ast.FunctionDef)
            yield child, where, within
            if not isinstance(child, ast.Raise):
                yield from walk(child, where, within)


def mutants(room: str) -> list[dict[str, Any]]:
    """All mutants of a room, each with its file, its place, and the text that stands there instead."""
    found, seen = [], collections.Counter[str]()
    places = [REPOSITORY / PACKAGE / name for name in ROOMS[room]]
    files = {file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))}
    for path in sorted(file for file in files if file.name != "catalogue.py"):
        text = path.read_text()
        starts = [0]
        for line in text.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node, lines, inside in walk(ast.parse(text), (1, 1), False):
            at: Any = node.test if isinstance(node, ast.If) else node
            if not hasattr(at, "end_col_offset"):
                continue
            first, last = (
                starts[n - 1] + c for n, c in ((at.lineno, at.col_offset), (at.end_lineno, at.end_col_offset))
            )
            for operator, new in changes(node, isinstance(node, ast.stmt)):
                after = ast.unparse(ast.fix_missing_locations(new))
                after = after if isinstance(new, ast.stmt) else f"({after})"
                mutant = {"room": room, "file": str(path.relative_to(REPOSITORY)), "line": at.lineno, "first": first}
                mutant |= {"last": last, "before": text.encode()[first:last].decode(), "after": after}
                mutant |= {"operator": operator, "lines": lines, "inside": inside}
                content = f"{mutant['file']} {text.splitlines()[at.lineno - 1]} {at.col_offset} {after}"
                seen[content] += 1
                found.append(mutant | {"id": hashlib.sha256(f"{content} {seen[content]}".encode()).hexdigest()[:12]})
    return found


def drawn(number: int, seed: int, rooms: list[str]) -> list[dict[str, Any]]:
    """As many of every room, at most one a line."""
    chosen = []
    for index, room in enumerate(rooms):
        by_line: dict[Any, list[Any]] = collections.defaultdict(list)
        for mutant in mutants(room):
            by_line[mutant["file"], mutant["line"]].append(mutant)
        rng = random.Random(f"{seed} {room}")
        wanted = number * (index + 1) // len(rooms) - number * index // len(rooms)
        lines = rng.sample(sorted(by_line), min(wanted, len(by_line)))
        for line in lines:
            kind = rng.choice(sorted({mutant["operator"] for mutant in by_line[line]}))
            chosen.append(rng.choice([mutant for mutant in by_line[line] if mutant["operator"] == kind]))
    return chosen


def copy_tree(folder: Path) -> Path:
    """The files that git knows or would add, with compiled files that follow their sources."""
    names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=REPOSITORY, capture_output=True)
    for name in filter(None, names.stdout.decode().split("\0")):
        if (REPOSITORY / name).is_file() and (name.endswith(".py") or not name.startswith("results/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    flags = ["-q", "--invalidation-mode", "checked-hash", PACKAGE]
    subprocess.run([sys.executable, "-m", "compileall", *flags], cwd=folder, check=True)
    return folder


LIMITS = 'ulimit -d 12000000 -f 4000000 2>/dev/null; exec "$@"'
"""A mutant may ask for any amount of memory or disk: kilobytes, and blocks of 512 bytes."""


def run_tests(folder: Path, tests: list[str], timeout: float, **variables: str) -> tuple[int | None, str]:
    """(exit status, None past `timeout`; what is said) of pytest in a copy of the tree, with caches of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PSPINAL_"))}
    kept |= {"PYTHONPATH": f"{folder}:{folder / 'results'}", "PYTHONDONTWRITEBYTECODE": "1"}
    kept |= {"JAX_COMPILATION_CACHE_DIR": str(CACHE / "xla"), "PSPINAL_JAX_CACHE": f"{folder}-cache", **variables}
    shutil.rmtree(f"{folder}-cache", ignore_errors=True)
    flags = ["-q", "--tb=no", "--basetemp", f"{folder}-tmp", "-m", "not slow and not torch"]
    flags += [word for name in ("randomly", "xdist", "cacheprovider") for word in ("-p", f"no:{name}")]
    command = ["nice", "sh", "-c", LIMITS, "sh", sys.executable, "-m", "pytest", *flags, *tests]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=kept, start_new_session=True, **pipes) as process:
        try:
            said, _ = process.communicate(timeout=timeout)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]


def traced(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Of each test of tests/`name` its seconds and the lines of the package that it runs; kept until either changes."""
    digest = hashlib.sha256()
    for root in (folder / PACKAGE, folder / "tests" / name):
        for path in sorted([root] if root.is_file() else root.rglob("*.py")):
            digest.update(path.read_bytes())
    kept = CACHE / f"{name.replace('/', '-')}-{digest.hexdigest()[:12]}.json"
    if not kept.exists():
        part = kept.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        status, said = run_tests(folder, ["-p", "mutants", f"tests/{name}"], 7200, MUTANTS_TRACE=str(part))
        if status not in (0, 1):
            raise SystemExit(f"tests/{name} cannot be traced:\n{said[-4000:]}")
        failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print("".join(f"left out, for it fails without a mutant: {line}\n" for line in failed), end="", flush=True)
        part.rename(kept)
    return json.loads(kept.read_text())


def tests_of(mutant: dict[str, Any], tests: dict[str, dict[str, Any]], most: float) -> list[str]:
    """Those that run its line, then the others of their files; by file and the fastest first."""
    wanted = set(range(mutant["lines"][0], mutant["lines"][1] + 1))
    direct = {name for name, test in tests.items() if wanted & set(test["lines"].get(mutant["file"], ()))}
    if not mutant["inside"]:  # of a module, run by whichever test was the first to import it
        direct = {name for name, test in tests.items() if mutant["file"] in test["lines"]}
    files = {name.split("::")[0] for name in direct}
    cost = {file: min(tests[name]["seconds"] for name in direct if name.startswith(f"{file}::")) for file in files}
    related = [name for name in tests if name.split("::")[0] in files]
    order = sorted(related, key=lambda name: (name not in direct, tests[name]["seconds"]))
    chosen, spent = [], 0.0
    for name in order:
        spent += tests[name]["seconds"]
        if chosen and spent > most:
            break
        chosen.append(name)
    place = {name: index for index, name in enumerate(order)}
    return sorted(chosen, key=lambda name: (cost[name.split("::")[0]], name.split("::")[0], place[name]))


def attempt(mutant: dict[str, Any], folder: Path, tests: dict[str, dict[str, Any]], most: float) -> dict[str, Any]:
    """The mutant with its outcome: killed, survived, or that no test runs it."""
    chosen, start = tests_of(mutant, tests, most), time.monotonic()
    outcome, killer = "no test", None
    if chosen:
        path = folder / mutant["file"]
        whole = path.read_bytes()
        path.write_bytes(whole[: mutant["first"]] + mutant["after"].encode() + whole[mutant["last"] :])
        try:
            status, said = run_tests(folder, ["-x", *chosen], 120 + 5 * most)
        finally:
            path.write_bytes(whole)
        if status == 5:
            raise RuntimeError(f"pytest found none of {chosen}")
        failed = [line.split(" - ")[0] for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        outcome = "survived" if status == 0 else "killed"
        killer = None if status == 0 else "timeout" if status is None else [*failed, f"exit status {status}"][0]
    seconds = round(time.monotonic() - start, 1)
    shown = ("id", "room", "file", "line", "operator", "before", "after")
    return {name: mutant[name] for name in shown} | {
        "outcome": outcome, "by": killer, "tests": len(chosen), "seconds": seconds
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """The score by room, and who survived."""
    lines = ["| room | mutants | killed | % | seconds each |", "|---|---|---|---|---|"]
    for room in [*ROOMS, "all"]:
        here = [each for each in results if room in (each["room"], "all")]
        if here:
            killed, seconds = (sum(each[name] for each in here) for name in ("killed", "seconds"))
            lines.append(
                f"| {room} | {len(here)} | {killed} | {100 * killed / len(here):.1f} | {seconds / len(here):.1f} |"
            )
    for each in results:
        if not each["killed"]:
            before, after = (" ".join(each[name].split())[:70] for name in ("before", "after"))
            lines.append(f"{each['id']} {each['outcome']}: {each['file']}:{each['line']}  {before}  ->  {after}")
    return "\n".join(lines)


def main() -> None:
    """Draw, try what has not been tried, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0, help="of tests for each mutant")
    parser.add_argument("--again", action="store_true", help="try once more what was not killed")
    parser.add_argument("--rooms", nargs="+", choices=list(ROOMS), default=list(ROOMS))
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "mutants.jsonl")
    arguments = parser.parse_args()
    chosen = drawn(arguments.number, arguments.seed, arguments.rooms)
    arguments.output.touch()
    done = map(json.loads, arguments.output.read_text().splitlines())
    known = {each["id"] for each in done if each["outcome"] == "killed" or not arguments.again}
    with tempfile.TemporaryDirectory() as temporary:
        folders = [copy_tree(Path(temporary) / str(number)) for number in range(arguments.workers)]
        with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
            paths = iter(TESTS)
            tests: dict[str, dict[str, Any]] = {}
            list(pool.map(lambda folder: [tests.update(traced(folder, name)) for name in paths], folders))
            waiting = iter([mutant for mutant in chosen if mutant["id"] not in known])

            def work(folder: Path) -> None:
                for mutant in waiting:
                    result = attempt(mutant, folder, tests, arguments.seconds)
                    with arguments.output.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                    print(
                        f"{result['outcome']:9} {result['seconds']:6} s  {result['file']}:{result['line']}", flush=True
                    )

            list(pool.map(work, folders))
    found = {each["id"]: each for each in map(json.loads, arguments.output.read_text().splitlines())}
    wanted = [found[mutant["id"]] for mutant in chosen]
    print(table([each | {"killed": each["outcome"] == "killed"} for each in wanted]))


# As a plugin of pytest, in the first run: which lines each test runs.
if os.environ.get("MUTANTS_TRACE"):
    import pytest

    _traced: dict[str, Any] = {}
    _lines: set[tuple[str, int]] = set()
    _failed: set[str] = set()
    _monitoring: Any = sys.monitoring  # type: ignore[attr-defined]

    def _at_line(code: Any, line: int) -> Any:
        if f"/{PACKAGE}/" in code.co_filename:
            _lines.add((code.co_filename, line))
        return _monitoring.DISABLE

    def pytest_sessionstart() -> None:
        """Watch every line."""
        _monitoring.use_tool_id(_monitoring.COVERAGE_ID, "mutants")
        _monitoring.register_callback(_monitoring.COVERAGE_ID, _monitoring.events.LINE, _at_line)
        _monitoring.set_events(_monitoring.COVERAGE_ID, _monitoring.events.LINE)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(item: Any) -> Any:
        """Write down the lines of one test."""
        _lines.clear()
        _monitoring.restart_events()
        start = time.monotonic()
        result = yield
        lines: dict[str, list[int]] = collections.defaultdict(list)
        for file, line in sorted(_lines):
            lines[f"{PACKAGE}/{file.rpartition(f'/{PACKAGE}/')[2]}"].append(line)
        _traced[item.nodeid] = {"seconds": round(time.monotonic() - start, 2), "lines": lines}
        return result

    def pytest_runtest_logreport(report: Any) -> None:
        """Note what fails."""
        if report.failed:
            _failed.add(report.nodeid)

    def pytest_sessionfinish() -> None:
        """Keep those that pass."""
        passed = {name: test for name, test in _traced.items() if name not in _failed}
        Path(os.environ["MUTANTS_TRACE"]).write_text(json.dumps(passed))


if __name__ == "__main__":
    main()
