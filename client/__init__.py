"""The site's side: policy, ledger, data and the three kinds of work."""
