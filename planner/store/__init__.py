"""The store: trials, plans and jobs in SQLite or PostgreSQL. The only part of the planner that imports SQLAlchemy."""

from planner.store.pages import GpuPlans, Page, PlanFilter, StoredTrial
from planner.store.store import Store

__all__ = ["GpuPlans", "Page", "PlanFilter", "Store", "StoredTrial"]
