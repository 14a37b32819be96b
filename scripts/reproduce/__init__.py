"""Scripts that each reproduce one table or picture of the documents from nothing, and resume."""
