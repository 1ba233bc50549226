"""Serve the site on this machine, and build it again when a notebook changes: python docs/live.py [PORT]"""
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parent.parent
HTML = ROOT / "docs" / "_build" / "html"


class Handler(SimpleHTTPRequestHandler):
    "Files as they are now, without a line for each."

    def end_headers(self):
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_): pass


def watched() -> dict[Path, float]:
    "What the site is made from, with the time of each file's last change."
    found = [path for path in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in path.parts)]
    found += [path for kind in ("*.py", "*.toml", "_static/*.*") for path in (ROOT / "docs").glob(kind)]
    found += [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "reprpo" / "_modidx.py"]
    return {path: path.stat().st_mtime for path in found if path.exists()}


def build(everything: bool) -> bool:
    "Pages that changed, or all of them; what is wrong is printed by the tools themselves."
    sphinx = ["-m", "sphinx", "-q", "-b", "html", "-j", "auto", "-d", "docs/_build/doctrees", "-c", "docs", "docs/_pages", HTML]
    for words in (["docs/prepare.py", "nbs", "docs/_pages"], [*sphinx, "-a"] if everything else sphinx):
        if subprocess.run([sys.executable, *words], cwd=ROOT).returncode: return False
    return True


def follow(every: float = 1.0) -> None:
    "Build whenever something changes; all pages where the sidebar or the looks may have."
    before = watched()
    while True:
        time.sleep(every)
        after = watched()
        if after == before: continue
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        everything, start = before.keys() != after.keys() or any(path.is_relative_to(ROOT / "docs") for path in changed), time.time()
        before, names = after, ", ".join(sorted(path.name for path in changed))
        if build(everything): print(f"built again in {time.time() - start:.0f} s: {names}; reload the page", flush=True)


def main(port: int) -> None:
    try: server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=HTML))
    except OSError as error: sys.exit(f"port {port}: {error.strerror}; make docs-live PORT={port + 1}")
    print(f"http://127.0.0.1:{port}, built again when a notebook changes; Ctrl-C ends it", flush=True)
    threading.Thread(target=follow, daemon=True).start()
    try: server.serve_forever()
    except KeyboardInterrupt: pass


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
