"""Shell around the engine: receive a batch, load, decide, commit, hand over; timers and recovery."""
