"""The engine process: scheduler, runner, migration and the step loop."""
