-- Run by the database at its first start. The database of the jobs of Serve is POSTGRES_DB; this one is Prefect's.
CREATE DATABASE prefect OWNER dermaflow;
