"""The operator's side: campaign, rounds, journal, report, metrics, command line."""
