"""One rank of one stage: ``python -m megatron_vcppo.stages STAGE --config RUN/config.yaml``.

Light on purpose: checkpoint writers are spawned processes that import this module again.
"""


def main() -> int:
    """Run the stage named on the command line; returns the exit code."""
    import argparse
    import importlib
    import os
    import warnings

    from megatron_vcppo.config.load import load_stored_config
    from megatron_vcppo.config.network import node_environment
    from megatron_vcppo.config.stage_overrides import stage_config
    from megatron_vcppo.errors import DONE, FAILED, PASSING, SAVED, USER_ERROR, UserError, system_error
    from megatron_vcppo.run import log
    from megatron_vcppo.run.access import follow
    from megatron_vcppo.run.events import startup
    from megatron_vcppo.stages.stopping import Saved, stopping

    parser = argparse.ArgumentParser(prog="python -m megatron_vcppo.stages", description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--config", required=True)
    arguments = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    log.configure("trainer", rank)
    stopping.listen()
    try:
        config = stage_config(load_stored_config(arguments.config), arguments.stage)
        follow(config.run.access)
        os.environ.update(node_environment(config.cluster))  # before torch is imported
        warnings.filterwarnings("ignore", module="megatron")  # at import, about parts that are not used here
        stage = importlib.import_module(f"megatron_vcppo.stages.{arguments.stage}")
        startup.done("imports")
        stage.run(config)
    except UserError as error:
        log.say(f"error: {error}")
        return USER_ERROR
    except OSError as error:
        found = system_error(error)
        if found is None:
            raise
        log.say(f"error: {found}")
        return FAILED if error.errno in PASSING else USER_ERROR
    except Saved as saved:
        if rank == 0:
            log.say(f"{arguments.stage}: {saved}")
        return SAVED
    return DONE


if __name__ == "__main__":
    code = main()
    from megatron_vcppo.run.processes import leave

    leave(code)
