"""What people read of a run or a spec: pictures and tables."""
