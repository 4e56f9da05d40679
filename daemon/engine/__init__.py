"""One device's worker: scheduler, model, sampler and the step loop."""
