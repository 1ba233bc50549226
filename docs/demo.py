"""Run `reprpo demo` from nothing and keep its table, with time and machine, for the first page: python docs/demo.py"""
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KEEP = Path(__file__).parent.parent / "files" / "results"


def machine() -> str:
    "Cores that this process may use, and their name."
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores ({found[1].strip() if found else platform.processor() or platform.machine()})"


def main() -> int:
    with tempfile.TemporaryDirectory() as home:
        out, start = Path(home) / "reprpo-demo", time.time()
        environment = os.environ | {"REPRPO_CACHE": str(Path(home) / "cache")}
        if code := subprocess.run([sys.executable, "-m", "reprpo", "demo", "--out", out], env=environment).returncode: return code
        seconds = time.time() - start
        KEEP.mkdir(parents=True, exist_ok=True)
        made = f"`reprpo demo` took {int(seconds) // 60} min {int(seconds) % 60} s on {machine()}, without a GPU."
        table = re.sub(r"\*\*Question\.\*\*[^\n]*\n+", "", (out / "table.md").read_text(encoding="utf-8")).replace("### Against", "**Against")
        table = re.sub(r"^\*\*Against (\S+)$", r"**Against \1**", table, flags=re.M)
        (KEEP / "demo.md").write_text(f"{table.strip()}\n\n{made}\n", encoding="utf-8")
        shutil.copy(out / "results.csv", KEEP / "demo.csv")
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        manifest |= {"command": "reprpo demo", "seconds": round(seconds, 1), "machine": machine(), "config": manifest["config"] | {"out": "reprpo-demo"}}
        (KEEP / "demo.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__": sys.exit(main())
