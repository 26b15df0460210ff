"""Who uses the server: tenants, what each may see and do, and what each has used."""
