"""Token streams: documents joined, packed into sequences, mixed by weight."""
