package main

import (
	"database/sql"
	"time"

	"github.com/google/uuid"
	_ "github.com/mattn/go-sqlite3"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/zeromicro/go-zero/core/logx"
)

const (
	tables = `
CREATE TABLE IF NOT EXISTS login_history (
	message_id TEXT PRIMARY KEY, trace_id TEXT, mobile TEXT NOT NULL, applied_at BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS login_count (mobile TEXT PRIMARY KEY, logins BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS history (one BIGINT PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL)`
	identify = `INSERT INTO history (one, id) VALUES (1, $1) ON CONFLICT (one) DO UPDATE SET id = id RETURNING id`
	record   = `INSERT INTO login_history (message_id, trace_id, mobile, applied_at) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING`
	count    = `INSERT INTO login_count (mobile, logins) VALUES ($1, 1) ON CONFLICT (mobile) DO UPDATE SET logins = logins + 1`
)

// history records each login once, by the id of its message, as durably as the system in Rust does.
type history struct {
	db            *sql.DB
	id            string
	record, count *sql.Stmt
}

func mustOpen(path string) *history {
	db, err := sql.Open("sqlite3", "file:"+path+"?_journal_mode=WAL&_synchronous=FULL&_busy_timeout=1000")
	logx.Must(err)
	db.SetMaxOpenConns(1)
	_, err = db.Exec(tables)
	logx.Must(err)
	h := &history{db: db}
	logx.Must(db.QueryRow(identify, uuid.NewString()).Scan(&h.id))
	h.record, err = db.Prepare(record)
	logx.Must(err)
	h.count, err = db.Prepare(count)
	logx.Must(err)
	return h
}

// apply records the logins in one transaction.
func (h *history) apply(batch []amqp.Delivery) error {
	tx, err := h.db.Begin()
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after the commit
	record, count := tx.Stmt(h.record), tx.Stmt(h.count)
	for _, delivery := range batch {
		id, message, producer, span, err := consume(delivery)
		defer span.End()
		if err != nil {
			logx.Errorf("not a login: %v", err)
			continue
		}
		result, err := record.Exec(id, producer.TraceID().String(), message.Msg, time.Now().UnixMilli())
		if err != nil {
			return err
		}
		if applied, _ := result.RowsAffected(); applied == 1 {
			if _, err := count.Exec(message.Msg); err != nil {
				return err
			}
		}
	}
	return tx.Commit()
}
