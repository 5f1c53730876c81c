"""``planner gpus``: the GPU types that plans can be made for."""

from __future__ import annotations

from planner.cli.options import AsJson, Debug
from planner.cli.tables import plain_table
from planner.cli.terminal import print_document, print_lines, stdout_console
from planner.cli.wording import gib


def gpus(as_json: AsJson = False, debug: Debug = False) -> int:
    """List the GPU types that plans can be made for."""
    from planner.gpus import default_capacity_bytes, list_gpus
    from planner.reports import gpu_dict

    known = list_gpus()
    if as_json:
        print_document({"gpus": [gpu_dict(gpu) for gpu in known]})
        return 0
    console = stdout_console()
    table = plain_table(
        console, "name", "GPU", "sm", "card GiB", "capacity GiB", right=("sm", "card GiB", "capacity GiB")
    )
    for gpu in known:
        major, minor = gpu.compute_capability
        capacity = gib(default_capacity_bytes(gpu)) + ("" if gpu.is_measured else " *")
        table.add_row(gpu.name, gpu.driver_names[0], f"{major}{minor}", gib(gpu.total_bytes), capacity)
    console.print(table)
    print_lines(
        console,
        [
            "",
            "capacity: what the caching allocator may reserve by default, beside the CUDA context and its libraries.",
            "* estimated: no card of this type was measured by this project; set --capacity where you know better.",
        ],
    )
    return 0
