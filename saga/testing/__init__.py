"""What a user tests with: so far the contract that every broker adapter keeps (`saga.testing.contract`)."""
