BEGIN TRANSACTION;
CREATE TABLE batches (
	id VARCHAR(64) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	name TEXT NOT NULL, 
	created FLOAT NOT NULL, 
	started FLOAT, 
	finished FLOAT, 
	source TEXT NOT NULL, 
	patients TEXT, 
	out TEXT NOT NULL, 
	model TEXT NOT NULL, 
	caller VARCHAR(64) NOT NULL, 
	error TEXT, 
	attempts INTEGER NOT NULL, 
	cancel BOOLEAN NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "batches" VALUES('b1','finished','a.zip',1.79568542640004229541e+09,1.79568542646830105777e+09,1.79568542648609328271e+09,'/in/a.zip',NULL,'/out','{"name": "tiny", "version": "tiny-1", "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "uri": "/models/tiny"}','clinic',NULL,0,0);
INSERT INTO "batches" VALUES('b2','queued','a.zip',1.79568542644656515116e+09,NULL,NULL,'/in/a.zip',NULL,'/out','{"name": "tiny", "version": "tiny-1", "sha256": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "uri": "/models/tiny"}','clinic',NULL,0,0);
CREATE INDEX ix_batches_state ON batches (state);
CREATE INDEX ix_batches_created ON batches (created);
COMMIT;
