"""The process that one form of a model is measured in. It speaks JSON lines with its parent: it says that it is ready,
does a round whenever it is asked for one, and says at the end how much memory it took at most."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from surgeon.quiet import quiet


def say(**message: Any) -> None:
    print(json.dumps(message), file=sys.__stdout__, flush=True)


def main() -> None:
    quiet()
    request = json.loads(sys.argv[1])
    sys.stdout = sys.stderr  # whatever a library prints is not for the parent to read
    from exporters.bench.timed import open_timed
    from surgeon.errors import SurgeonError
    from surgeon.inputs import Prompt

    prompts = [Prompt(request["prompt"], tuple(map(Path, request["images"])))] * request["batch"]
    try:
        begin = time.perf_counter()
        timed = open_timed(Path(request["path"]), prompts, request["threads"], request["provider"])
        timed.run(2)  # loads what is loaded when first used
        about = {"stage": timed.stage, "dtype": timed.dtype, "device": timed.device}
        say(ready=about | {"prompt_tokens": timed.prompt_tokens, "load_seconds": time.perf_counter() - begin})
        for _ in sys.stdin:
            say(ends=timed.run(request["steps"]))
    except SurgeonError as error:
        say(error=str(error), exit_code=error.exit_code)
        sys.exit(error.exit_code)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    say(peak_memory=peak, device_memory=timed.device_memory())


if __name__ == "__main__":
    main()
