"""What a step, a loader and a command take, measured side by side with what else there is."""
