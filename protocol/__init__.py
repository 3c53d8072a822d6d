"""What both sides agree on: the plan, the messages, identities and errors."""
