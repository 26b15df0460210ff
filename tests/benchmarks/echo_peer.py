"""A peer that answers every job at once, for tests of the protocol."""

import os
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.worker import Job, Result, Run, serve


def load(config: Mapping[str, Any]) -> Run:
    print("noise on standard output")
    if "refuse" in config:
        raise ValueError(config["refuse"])

    def run(job: Job) -> Result:
        print("more noise", flush=True)
        if job["answers"] == [0]:
            os._exit(1)
        if not job["prompts"]:
            raise ValueError("no prompts")
        return {"seconds": config["seconds"], "tokens": job["prompts"][0]}

    return run


if __name__ == "__main__":
    serve(load)
