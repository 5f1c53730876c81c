"""The planner's HTTP service: jobs, preflight, plans and the pages that show them. Imports no torch."""
