"""The zoo on the nodes of a Ray cluster: one task a node, which starts torchrun there.

    python with_ray.py --nodes 2 --processes 4 predict molecules.xyz runs/RUN --output table.csv

Ray decides where; the processes find each other as torchrun's do anywhere. Needs: pip install ray.
"""

import argparse
import socket
import subprocess
import sys

try:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    raise SystemExit(f"this example needs ray: pip install ray ({error})") from None


def torchrun(node: int, nodes: int, processes: int, head: tuple[str, int]) -> list[str]:
    """The beginning of the command line on a node; head: address and port of the first."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(nodes), "--nproc_per_node", str(processes), "--node_rank", str(node)),
        *("--master_addr", head[0], "--master_port", str(head[1])),
        *("-m", "attnpool_kernels.zoo"),
    ]


@ray.remote
def address() -> tuple[str, int]:
    """Address and a free port of the node where this runs."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


@ray.remote
def run(command: list[str]) -> int:
    return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="The zoo on the nodes of a Ray cluster.")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="of each node")
    parser.add_argument("--gpus", type=int, default=0, help="of each node")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="fit ..., test ... or predict ..."
    )
    given = parser.parse_args()
    ray.init()
    needs = {"CPU": given.processes, "GPU": given.gpus}
    group = placement_group([needs] * given.nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def on(node: int) -> dict:
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        resources = {"num_cpus": given.processes, "num_gpus": given.gpus}
        return {**resources, "scheduling_strategy": place}

    head = ray.get(address.options(**on(0)).remote())
    codes = [
        run.options(**on(i)).remote(
            [*torchrun(i, given.nodes, given.processes, head), *given.command]
        )
        for i in range(given.nodes)
    ]
    return max(ray.get(codes))


if __name__ == "__main__":
    sys.exit(main())
