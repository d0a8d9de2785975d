"""Appose asks a worker of ours, as its own users do.

python appose_client.py '["-c", "…", "…"]'      # the options that make Python the worker
"""

from __future__ import annotations

import json
import os
import sys
import threading
from multiprocessing import shared_memory


def main() -> None:
    import appose
    import numpy as np
    from appose.service import TaskStatus

    environment = appose.custom().base(sys.prefix).build()
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()  # noqa: PTH208, PTH112
    service = environment.python(*json.loads(sys.argv[1])).syntax("python")
    service.init("import numpy as np\nprepared = 41")
    with service:
        # Tasks, several at once, that print without an end of the line.
        tasks = [service.task(f"print('.', end='')\nprepared + {n}").start() for n in range(50)]
        waiting = [task for task in tasks if not task.status.is_finished()]
        for task in waiting:
            # Theirs waits for ever if the task ends just before.
            while not task.status.is_finished():
                with task.cv:
                    task.cv.wait(0.05)
        assert [task.result() for task in tasks] == [41 + n for n in range(50)]

        # Arrays, made by the caller: in place, and given back.
        with appose.NDArray("uint16", [2, 3]) as image:
            image.ndarray()[...] = np.arange(6).reshape(2, 3)
            script = "a = image.ndarray()\na += 1\n{'sum': int(a.sum()), 'image': image}"
            outputs = finished(service.task(script, {"image": image})).outputs
            assert outputs["sum"] == 21
            assert image.ndarray().tolist() == [[1, 2, 3], [4, 5, 6]]
            assert outputs["image"].shm.name == image.shm.name
            # One that the worker made; the caller removes it.
            task = finished(service.task("image * np.float32(2)", {"image": image}))
            with task.result() as double:
                assert (double.dtype, double.shape) == ("float32", [2, 3])
                assert double.ndarray().tolist() == [[2, 4, 6], [8, 10, 12]]
                double.shm.unlink_on_dispose(True)
            # One that a script made with Appose.
            script = (
                "import appose\n"
                "made = appose.NDArray('float64', [3])\n"
                "made.ndarray()[...] = 7\n"
                "made"
            )
            with finished(service.task(script)).result() as made:
                assert made.ndarray().tolist() == [7, 7, 7]
                made.shm.unlink_on_dispose(True)

        # Variables, calls, objects that stay there.
        service.put_var("x", 5)
        assert service.get_var("x") == 5
        assert service.call("max", 3, 8) == 8
        third = finished(service.task("from fractions import Fraction\nFraction(2, 6)")).result()
        assert third.limit_denominator(2).denominator == 2
        finished(service.task("task.export(words={'a': 1})"))
        assert service.proxy("words").get("a") == 1

        # Progress, cancelling, failing.
        said = []
        busy = threading.Event()
        task = service.task(
            "task.update('busy', current=1, maximum=3)\n"
            "while not task.cancel_requested: pass\n"
            "task.cancel()"
        )
        task.listen(lambda event: said.append(str(event)))
        task.listen(lambda event: event.message == "busy" and busy.set())
        task.start()
        assert busy.wait(60)
        task.cancel()
        error = failed(task)
        assert task.status == TaskStatus.CANCELED, error
        assert [text.partition("]")[0] for text in said] == [
            "[ResponseType.LAUNCH",
            "[ResponseType.UPDATE",
            "[ResponseType.CANCELATION",
        ]
        task = service.task("1 / 0")
        assert "ZeroDivisionError" in failed(task)
        assert task.status == TaskStatus.FAILED
        assert "SystemExit: 3" in failed(service.task("import sys\nsys.exit(3)"))
        assert finished(service.task("prepared")).result() == 41
    assert service.wait_for() == 0
    assert service.invalid_lines() == []
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()  # noqa: PTH208, PTH112
    left = {name for name in after - before if name.startswith("psm_")}
    for name in left:
        # Other processes have some too.
        assert shared_memory.SharedMemory(name).size > 64
    print("all as expected")


def finished(task):
    return task.wait_for()


def failed(task):
    from appose.service import TaskException

    try:
        task.wait_for()
    except TaskException as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
